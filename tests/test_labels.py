"""Labels: set by the application, inherited, and those of a request."""

import asyncio
import contextvars
import gc
import inspect
import weakref

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from asgi_pprof.labels import current, labels, resolve
from asgi_pprof.request_labels import RequestLabels, route_template


def seen():
    """Return the labels a sample taken here would get."""
    return dict(resolve(current.get()))


class TestContextManager:
    def test_labels_hold_inside_and_not_outside(self):
        """What was there before comes back."""
        assert seen() == {}
        with labels(tenant="acme"):
            assert seen() == {"tenant": "acme"}
        assert seen() == {}

    def test_labels_end_with_an_exception(self):
        """Also a block that fails leaves nothing behind."""
        with pytest.raises(LookupError), labels(tenant="acme"):
            raise LookupError
        assert current.get() is None

    def test_inner_labels_add_to_outer_ones_and_win(self):
        """The nearest value of a key counts, until its block ends."""
        with labels(tenant="acme", job="import"):
            with labels(job="export", step="1"):
                assert seen() == {"tenant": "acme", "job": "export", "step": "1"}
            assert seen() == {"tenant": "acme", "job": "import"}

    def test_keys_need_not_be_python_names(self):
        """A mapping takes any key; a keyword of the same name wins."""
        with labels({"http.route": "/cart", "mapping": "a", "self": "b"}, mapping="c"):
            assert seen() == {"http.route": "/cart", "mapping": "c", "self": "b"}

    def test_values_are_turned_into_strings(self):
        """At once: what they were is not kept."""
        values = [1]
        with labels(shard=7, flag=None, values=values):
            values.append(2)
            assert seen() == {"shard": "7", "flag": "None", "values": "[1]"}

    def test_labels_are_sorted_by_key(self):
        """As a profile's samples need them."""
        with labels(b="1"), labels(a="2", c="3"):
            assert resolve(current.get()) == (("a", "2"), ("b", "1"), ("c", "3"))

    def test_one_manager_can_be_entered_again_inside_itself(self):
        """Entering counts."""
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
        """Scrapers drop or refuse the whole profile for one."""
        with pytest.raises(ValueError, match="non-empty key and value"):
            labels(pairs)

    def test_the_message_shows_the_pair(self):
        """So that one finds it."""
        with pytest.raises(ValueError, match="got 'tenant': ''"):
            labels(tenant="")


class TestDecorator:
    def test_a_plain_function_runs_with_the_labels(self):
        """And keeps its arguments, result and name."""

        @labels(job="import")
        def import_cart(first, *, second):
            """Import."""
            return first, second, seen()

        assert import_cart(1, second=2) == (1, 2, {"job": "import"})
        assert (import_cart.__name__, import_cart.__doc__) == ("import_cart", "Import.")
        assert not inspect.iscoroutinefunction(import_cart)
        assert seen() == {}

    def test_an_async_function_runs_with_the_labels(self):
        """Across its awaits, not only until the first."""

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
        """`self` arrives."""

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
        """First in, first out: each puts back what its own task had."""

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
        """A generator runs piecemeal in its callers' contexts, where labels would leak."""

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
        """Also after the parent's block has ended."""

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
        """Labels go down, not up."""

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


# Real applications, driven with plain scopes: what routing leaves in a scope is theirs to say.


def request_scope(path, method="GET", **changes):
    """Return the scope of a request as uvicorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50_000),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "state": {},
        **changes,
    }


def serve(app, scope):
    """Run one request and return its status."""

    async def main():
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    return asyncio.run(main())


def fastapi_app():
    """Return an application with a router included twice, and another application mounted."""
    items, shop = APIRouter(), APIRouter()

    @items.get("/items/{item_id}")
    async def item(item_id: int):
        return item_id

    @items.get("")
    async def overview():
        return 1

    shop.include_router(items, prefix="/deep")

    def application():
        app = FastAPI()

        @app.get("/plain")
        async def plain():
            return 1

        @app.get("/")
        async def root():
            return 1

        app.include_router(items, prefix="/v1")
        app.include_router(items, prefix="/v2/{tenant}")
        app.include_router(shop, prefix="/shop")
        return app

    app = application()
    app.mount("/sub/{tenant}", application())
    return app


def starlette_app():
    """Return an application with mounts in mounts."""

    async def answer(request):
        return PlainTextResponse("ok")

    inner = [Route("/z", answer)]
    return Starlette(
        routes=[
            Route("/", answer),
            Route("/plain", answer),
            Route("/users/{user:int}", answer),
            Mount("/static", routes=[Route("/z", answer)]),
            Mount(
                "/a/{b}",
                routes=[
                    Route("/", answer),
                    Route("/c/{d}", answer),
                    Mount("/in/{e}", app=Starlette(routes=inner)),
                ],
            ),
            Mount("/wild/{rest:path}", routes=inner),
            Mount("/opaque", app=PlainTextResponse("ok")),
        ]
    )


@pytest.mark.parametrize(
    ("make_app", "path", "template"),
    [
        (fastapi_app, "/", "/"),
        (fastapi_app, "/plain", "/plain"),
        (fastapi_app, "/v1/items/3", "/v1/items/{item_id}"),
        (fastapi_app, "/v2/acme/items/3", "/v2/{tenant}/items/{item_id}"),
        (fastapi_app, "/v1", "/v1"),
        (fastapi_app, "/v2/acme", "/v2/{tenant}"),
        (fastapi_app, "/shop/deep/items/3", "/shop/deep/items/{item_id}"),
        (fastapi_app, "/sub/acme/", "/sub/{tenant}/"),
        (fastapi_app, "/sub/acme/plain", "/sub/{tenant}/plain"),
        (fastapi_app, "/sub/acme/v1/items/3", "/sub/{tenant}/v1/items/{item_id}"),
        (fastapi_app, "/sub/acme/shop/deep/items/3", "/sub/{tenant}/shop/deep/items/{item_id}"),
        (starlette_app, "/", "/"),
        (starlette_app, "/plain", "/plain"),
        (starlette_app, "/users/3", "/users/{user:int}"),
        (starlette_app, "/static/z", "/static/z"),
        (starlette_app, "/a/1/", "/a/{b}/"),
        (starlette_app, "/a/1/c/2", "/a/{b}/c/{d}"),
        (starlette_app, "/a/1/in/2/z", "/a/{b}/in/{e}/z"),
        (starlette_app, "/wild/1/2/z", "/wild/{rest:path}/z"),
    ],
)
@pytest.mark.parametrize("root_path", ["", "/api"])
def test_a_route_is_named_by_its_template(make_app, path, template, root_path):
    """Prefixes and mounts included, values and the server's root path not."""
    scope = request_scope(root_path + path, root_path=root_path)
    assert serve(make_app(), scope) == 200
    assert route_template(scope) == template
    request = RequestLabels(scope)
    assert request.own() == {"method": "GET", "route": template}
    request.finish()
    assert request.own() == {"method": "GET", "route": template}


@pytest.mark.parametrize(
    ("make_app", "path"),
    [
        (fastapi_app, "/nope"),
        (fastapi_app, "/v1/nope"),
        (fastapi_app, "/shop/deep/nope"),
        (fastapi_app, "/sub/acme/nope"),
        (starlette_app, "/nope"),
        (starlette_app, "/users/nobody"),
        (starlette_app, "/static/nope"),
        (starlette_app, "/a/1/nope"),
        (starlette_app, "/a/1/in/2/nope"),
        (lambda: Starlette(routes=[Mount("", routes=[Route("/plain", print)])]), "/nope"),
    ],
)
def test_an_unmatched_request_has_no_route(make_app, path):
    """Else every path a scanner tries would be a label."""
    scope = request_scope(path)
    assert serve(make_app(), scope) == 404
    assert route_template(scope) == ""
    assert RequestLabels(scope).own() == {"method": "GET"}


def test_a_mounted_app_without_routes_is_named_by_its_mount():
    """As for static files; the path below it is never a label."""
    scope = request_scope("/opaque/secret")
    assert serve(starlette_app(), scope) == 200
    assert route_template(scope) == "/opaque"


def test_a_request_has_no_route_before_routing():
    """The method is known at once, the route as soon as the router has found it."""
    scope = request_scope("/plain", method="PUT")
    assert RequestLabels(scope).own() == {"method": "PUT"}


@pytest.mark.parametrize("route", [None, object(), type("Odd", (), {"path": None})()])
def test_routers_that_we_do_not_know_leave_no_route(route):
    """Some other framework's `route` need not have a path."""
    assert route_template({"type": "http", "route": route}) == ""


def test_the_endpoint_itself_sees_its_route():
    """The label is there while the endpoint runs, which is when samples are taken."""
    app = FastAPI()

    @app.get("/carts/{cart}")
    async def cart(cart: str):
        return seen()

    scope = request_scope("/carts/7")
    found = []

    async def main():
        async def send(message):
            found.append(message.get("body"))

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        current.set(RequestLabels(scope))
        await app(scope, receive, send)

    contextvars.copy_context().run(lambda: asyncio.run(main()))
    assert b'"route":"/carts/{cart}"' in found[1]


def test_labels_inside_a_request_add_to_its_own():
    """Outer labels, then the request's, then those set while it is served."""
    with labels(tenant="acme", method="outer"):
        token = current.set(RequestLabels(request_scope("/plain"), current.get()))
        with labels(job="import"):
            assert seen() == {"tenant": "acme", "method": "GET", "job": "import"}
        current.reset(token)


class Session:
    """Something a request carries, which must not live as long as a task it started."""


@pytest.mark.parametrize("make_app", [fastapi_app, starlette_app])
@pytest.mark.parametrize("path", ["/plain", "/sub/acme/plain", "/a/1/c/2", "/nope"])
def test_a_finished_request_is_let_go_of(make_app, path):
    """A task that outlives the request keeps the route, not the scope."""
    session = Session()
    scope = request_scope(path, state={"session": session}, session=session)
    request = RequestLabels(scope)
    serve(make_app(), scope)
    before, alive = request.own(), weakref.ref(session)
    request.finish()
    del session, scope
    gc.collect()
    assert alive() is None
    assert request.own() == before
