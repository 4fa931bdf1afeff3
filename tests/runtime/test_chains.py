"""Chains of awaits, followed without running code of the awaitables."""

from __future__ import annotations

import asyncio
import types

import pytest

from asgi_pprof.runtime.chains import await_chain, awaitables


class HostileMeta(type):
    """A metaclass whose methods must not be called."""

    def __getattribute__(cls, name):
        raise AssertionError(name)

    def __eq__(cls, other):
        raise AssertionError("compared")

    def __hash__(cls):
        raise AssertionError("hashed")


class Hostile(metaclass=HostileMeta):
    """An awaitable of which no attribute may be read; only its `__await__` may be called."""

    def __getattribute__(self, name):
        raise AssertionError(name)

    def __await__(self):
        return iter([1, 2])


def started(coroutine):
    coroutine.send(None)
    return coroutine


async def wait(awaitable):
    await awaitable


async def generate(awaitable):
    yield await awaitable


async def iterate(awaitable):
    async for _ in generate(awaitable):
        pass


@types.coroutine
def pause():
    yield


class Wrapped:
    """Delegates to a coroutine, as a proxy does."""

    def __init__(self, coroutine):
        self.__wrapped__ = coroutine

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.__wrapped__.send(None)


def names(coroutine, **options):
    return [
        getattr(each, "__name__", type(each).__name__) for each in awaitables(coroutine, **options)
    ]


def test_a_chain_goes_through_every_kind_of_coroutine():
    """Objects that only drive a coroutine are skipped. The last item is the end of the chain."""
    coroutine = started(iterate(wait(pause())))
    assert names(coroutine) == ["iterate", "generate", "wait", "pause", "NoneType"]
    coroutine.close()


def test_a_proxy_is_followed_only_if_its_code_may_run():
    """Otherwise the proxy is the end of the chain."""
    coroutine = started(wait(Wrapped(wait(pause()))))
    assert names(coroutine) == ["wait", "Wrapped"]
    assert names(coroutine, runs_code=True) == ["wait", "wait", "pause", "NoneType"]
    assert [code.co_name for _, code, _ in await_chain(coroutine)] == ["wait", "wait", "pause"]
    coroutine.close()


@pytest.mark.parametrize("outer", [wait, iterate])
def test_no_code_of_an_awaitable_or_its_class_runs(outer):
    """Types are compared by identity."""
    coroutine = started(outer(Hostile()))
    *chain, _ = awaitables(coroutine)
    assert [each.__name__ for each in chain][0] == outer.__name__
    hostile = object.__new__(Hostile)
    assert [each is hostile for each in awaitables(hostile)] == [True]
    coroutine.close()


def test_the_future_at_the_end_is_not_part_of_the_chain():
    """An object that is no coroutine has an empty chain."""

    async def main():
        future = asyncio.get_running_loop().create_future()
        coroutine = started(wait(future))
        found = [each.awaitable for each in await_chain(coroutine)], await_chain(future)
        coroutine.close()
        return found, coroutine

    (chain, of_future), coroutine = asyncio.run(main())
    assert chain == [coroutine]
    assert of_future == []
