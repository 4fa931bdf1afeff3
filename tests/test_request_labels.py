"""The labels of a request are its method and its route's template, as real routers set them."""

import asyncio
import contextvars
import functools
import gc
import weakref

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_pprof import PprofMiddleware
from asgi_pprof.labels import current, labels, resolve
from asgi_pprof.request_labels import RequestLabels, route_template


def seen():
    """Return the labels that a sample taken here would get."""
    return dict(resolve(current.get()))


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


@functools.cache
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


@functools.cache
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
    """The template includes prefixes and mounts, but neither values nor the server's root path."""
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
    """Otherwise every path that a scanner tries would become a label."""
    scope = request_scope(path)
    assert serve(make_app(), scope) == 404
    assert route_template(scope) == ""
    assert RequestLabels(scope).own() == {"method": "GET"}


def test_a_mounted_app_without_routes_is_named_by_its_mount():
    """This is so for static files: the path below the mount never becomes a label."""
    scope = request_scope("/opaque/secret")
    assert serve(starlette_app(), scope) == 200
    assert route_template(scope) == "/opaque"


def older_starlette_app(shared):
    """Return an application whose endpoints differ, but for one that has three routes."""

    def endpoint():
        async def answer(request):
            return PlainTextResponse("ok")

        return answer

    return Starlette(
        routes=[
            Route("/", endpoint()),
            Route("/users/{user:int}", endpoint()),
            Route("/shared/{one}", shared),
            Route("/shared/{one}/{two}", shared),
            Route("/also/{one}/{two}", shared),
            Mount("/a/{b}", routes=[Mount("/in/{e}", app=Starlette(routes=[Route("/z", shared)]))]),
            Mount("/opaque", app=PlainTextResponse("ok")),
        ]
    )


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/", "/"),
        ("/users/3", "/users/{user:int}"),
        ("/shared/1", "/shared/{one}"),
        ("/shared/1/2", ""),  # one of two, and nothing says which
        ("/also/1/2", ""),
        ("/a/1/in/2/z", "/a/{b}/in/{e}/z"),
        ("/opaque/secret", "/opaque"),
        ("/nope", ""),
        ("/a/1/nope", ""),
        ("/a/1/in/2/nope", ""),
    ],
)
def test_without_a_route_in_the_scope_the_endpoint_tells(path, template):
    """Starlette has set `route` for its own routes since 1.0 only."""

    async def shared(request):
        return PlainTextResponse("ok")

    scope = request_scope(path)
    serve(older_starlette_app(shared), scope)
    scope.pop("route", None)
    request = RequestLabels(scope)
    expected = {"method": "GET", **({"route": template} if template else {})}
    assert request.own() == expected
    request.finish()
    assert request.own() == expected


def test_a_route_that_is_added_later_is_found():
    """The templates of a router are remembered until its routes change."""

    async def later(request):
        return PlainTextResponse("ok")

    async def first(request):
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/first", first)])
    for path, endpoint in (("/first", first), ("/later", later)):
        if endpoint is later:
            app.router.routes.append(Route("/later", later))
        scope = request_scope(path)
        assert serve(app, scope) == 200
        scope.pop("route", None)
        assert route_template(scope) == path


def test_litestar_s_template_is_the_route():
    """Litestar leaves it in the scope under a name of its own."""
    scope = request_scope("/orders/7", path_template="/orders/{number}")
    assert RequestLabels(scope).own() == {"method": "GET", "route": "/orders/{number}"}


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_a_websocket_has_a_method_and_a_route(framework):
    """So have the samples that are taken while it is open."""
    found = []

    async def echo(websocket: WebSocket):
        await websocket.accept()
        found.append(seen())
        await websocket.close()

    if framework == "starlette":
        app = Starlette(routes=[WebSocketRoute("/rooms/{room}", echo)])
    else:
        app = FastAPI()
        app.websocket("/rooms/{room}")(echo)
    wrapped = PprofMiddleware(app, memory_profile_rate=0)

    async def main():
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            pass

        scope = request_scope("/rooms/7", type="websocket", scheme="ws", subprotocols=[])
        del scope["method"]
        await wrapped(scope, receive, send)

    asyncio.run(main())
    assert found == [{"method": "WEBSOCKET", "route": "/rooms/{room}"}]


def test_a_request_has_no_route_before_routing():
    """The method is known at once, the route as soon as the router has found it."""
    scope = request_scope("/plain", method="PUT")
    assert RequestLabels(scope).own() == {"method": "PUT"}


@pytest.mark.parametrize("route", [None, object(), type("Odd", (), {"path": None})()])
def test_routers_that_we_do_not_know_leave_no_route(route):
    """Another framework's `route` need not have a path."""
    assert route_template({"type": "http", "route": route}) == ""


def test_the_endpoint_itself_sees_its_route():
    """The label is set while the endpoint runs, which is when samples are taken."""
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
    """The outer labels come first, then the request's, then those set while it is served."""
    with labels(tenant="acme", method="outer"):
        token = current.set(RequestLabels(request_scope("/plain"), current.get()))
        with labels(job="import"):
            assert seen() == {"tenant": "acme", "method": "GET", "job": "import"}
        current.reset(token)


class Session:
    """An object that a request carries, which must not live as long as a task it started."""


@pytest.mark.parametrize("make_app", [fastapi_app, starlette_app])
@pytest.mark.parametrize("path", ["/plain", "/sub/acme/plain", "/a/1/c/2", "/nope"])
def test_a_finished_request_is_released(make_app, path):
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
