"""A proxy of a coroutine, as tracing libraries make them."""


class Proxy:
    """Delegates to a coroutine, and pretends to be of its class, as wrapt's ObjectProxy does."""

    def __init__(self, wrapped):
        self.__wrapped__ = wrapped

    @property
    def __class__(self):
        return type(self.__wrapped__)

    def __getattr__(self, name):
        return getattr(self.__wrapped__, name)

    def __await__(self):
        return self.__wrapped__.__await__()

    def __next__(self):
        return self.__wrapped__.send(None)

    def send(self, value):
        return self.__wrapped__.send(value)
