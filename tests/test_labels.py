"""The application can set labels, which tasks and threads inherit."""

import asyncio
import inspect

import pytest

from asgi_pprof.labels import current, labels, resolve


def seen():
    """Return the labels that a sample taken here would get."""
    return dict(resolve(current.get()))


class TestContextManager:
    def test_labels_hold_inside_and_not_outside(self):
        """Leaving the block restores the labels from before."""
        assert seen() == {}
        with labels(tenant="acme"):
            assert seen() == {"tenant": "acme"}
        assert seen() == {}

    def test_labels_end_with_an_exception(self):
        """A block that raises leaves no labels behind."""
        with pytest.raises(LookupError), labels(tenant="acme"):
            raise LookupError
        assert current.get() is None

    def test_inner_labels_add_to_outer_ones_and_win(self):
        """The innermost value of a key counts until its block ends."""
        with labels(tenant="acme", job="import"):
            with labels(job="export", step="1"):
                assert seen() == {"tenant": "acme", "job": "export", "step": "1"}
            assert seen() == {"tenant": "acme", "job": "import"}

    def test_keys_need_not_be_python_names(self):
        """A mapping takes any key; a keyword of the same name wins."""
        with labels({"http.route": "/cart", "mapping": "a", "self": "b"}, mapping="c"):
            assert seen() == {"http.route": "/cart", "mapping": "c", "self": "b"}

    def test_values_are_turned_into_strings(self):
        """They are converted at once; the original values are not kept."""
        values = [1]
        with labels(shard=7, flag=None, values=values):
            values.append(2)
            assert seen() == {"shard": "7", "flag": "None", "values": "[1]"}

    def test_labels_are_sorted_by_key(self):
        """Samples of a profile need their labels in this order."""
        with labels(b="1"), labels(a="2", c="3"):
            assert resolve(current.get()) == (("a", "2"), ("b", "1"), ("c", "3"))

    def test_one_manager_can_be_entered_again_inside_itself(self):
        """Entries are counted."""
        tenant = labels(tenant="acme")
        with tenant:
            with tenant:
                assert seen() == {"tenant": "acme"}
            assert seen() == {"tenant": "acme"}
        assert seen() == {}

    def test_one_manager_may_be_entered_by_tasks_that_overlap(self):
        """A manager made once, at the top of a module, serves every task."""
        tenant = labels(tenant="acme")

        async def hold(entered, leave):
            with tenant:
                entered.set()
                await leave.wait()
            return seen()

        async def main():
            second_entered, first_left = asyncio.Event(), asyncio.Event()
            first = asyncio.create_task(hold(asyncio.Event(), second_entered))
            first.add_done_callback(lambda _: first_left.set())
            await asyncio.sleep(0)
            second = asyncio.create_task(hold(second_entered, first_left))
            return await asyncio.gather(first, second)

        assert asyncio.run(main()) == [{}, {}]

    @pytest.mark.parametrize(
        "pairs", [{"": "acme"}, {"tenant": ""}, {"a": "b", "tenant": ""}, {"tenant": b"".decode()}]
    )
    def test_an_empty_key_or_value_is_refused(self, pairs):
        """One such label makes scrapers drop or refuse the whole profile."""
        with pytest.raises(ValueError, match="non-empty key and value"):
            labels(pairs)

    def test_the_message_shows_the_pair(self):
        """The reader can find the faulty call."""
        with pytest.raises(ValueError, match="got 'tenant': ''"):
            labels(tenant="")


class TestDecorator:
    def test_a_plain_function_runs_with_the_labels(self):
        """Its arguments, result and name stay the same."""

        @labels(job="import")
        def import_cart(first, *, second):
            """Import."""
            return first, second, seen()

        assert import_cart(1, second=2) == (1, 2, {"job": "import"})
        assert (import_cart.__name__, import_cart.__doc__) == ("import_cart", "Import.")
        assert not inspect.iscoroutinefunction(import_cart)
        assert seen() == {}

    def test_an_async_function_runs_with_the_labels(self):
        """The labels hold across its awaits, not only until the first."""

        @labels(job="import")
        async def import_cart():
            before = seen()
            await asyncio.sleep(0)
            return before, seen()

        async def main():
            return await import_cart(), seen()

        assert inspect.iscoroutinefunction(import_cart)
        assert asyncio.run(main()) == (({"job": "import"}, {"job": "import"}), {})

    def test_a_method_can_be_decorated(self):
        """The method receives `self`."""

        class Cart:
            @labels(job="total")
            def total(self):
                return self, seen()

        cart = Cart()
        assert cart.total() == (cart, {"job": "total"})

    def test_a_decorated_function_may_call_itself(self):
        """Each call has a manager of its own."""

        @labels(job="walk")
        def walk(depth):
            return [seen(), *(walk(depth - 1) if depth else [])]

        assert walk(3) == [{"job": "walk"}] * 4
        assert seen() == {}

    def test_tasks_that_overlap_in_one_decorated_function_keep_their_own_labels(self):
        """The first to enter is the first to leave; each restores the labels of its own task."""

        @labels(job="serve")
        async def serve(entered, leave):
            entered.set()
            await leave.wait()
            return seen()

        async def with_tenant(tenant, entered, leave):
            with labels(tenant=tenant):
                inside = await serve(entered, leave)
                return inside, seen()

        async def main():
            events = [(asyncio.Event(), asyncio.Event()) for _ in range(2)]
            tasks = [
                asyncio.create_task(with_tenant(tenant, *pair))
                for tenant, pair in zip(["acme", "globex"], events, strict=True)
            ]
            for entered, _ in events:
                await entered.wait()
            for _, leave in events:
                leave.set()
                await asyncio.sleep(0)
            return await asyncio.gather(*tasks)

        assert asyncio.run(main()) == [
            ({"tenant": "acme", "job": "serve"}, {"tenant": "acme"}),
            ({"tenant": "globex", "job": "serve"}, {"tenant": "globex"}),
        ]

    def test_generators_are_refused_by_name(self):
        """A generator runs in its callers' contexts, piece by piece, and its labels would leak."""

        def list_carts():
            yield 1

        async def stream_carts():
            yield 1

        with pytest.raises(TypeError, match="list_carts"):
            labels(job="x")(list_carts)
        with pytest.raises(TypeError, match="stream_carts"):
            labels(job="x")(stream_carts)


class TestInheritance:
    def test_child_tasks_inherit_and_keep_what_their_parent_had(self):
        """They keep them after the parent's block has ended."""

        async def child(leave):
            await leave.wait()
            return seen()

        async def main():
            leave = asyncio.Event()
            with labels(tenant="acme"):
                task = asyncio.create_task(child(leave))
            leave.set()
            return await task, seen()

        assert asyncio.run(main()) == ({"tenant": "acme"}, {})

    def test_what_a_child_sets_is_its_own(self):
        """The parent does not get the labels of its child."""

        async def child():
            current.set(None)
            with labels(tenant="globex"):
                await asyncio.sleep(0)
                return seen()

        async def main():
            with labels(tenant="acme"):
                return await asyncio.create_task(child()), seen()

        assert asyncio.run(main()) == ({"tenant": "globex"}, {"tenant": "acme"})

    def test_a_worker_thread_inherits(self):
        """asyncio.to_thread copies the context."""

        async def main():
            with labels(tenant="acme"):
                return await asyncio.to_thread(seen)

        assert asyncio.run(main()) == {"tenant": "acme"}
