"""
A small shop that shows something in every profile.

Prices and search use CPU on the event loop, reports use it in the thread pool,
orders wait for a lock and for a payment, a cache grows to some megabytes, and
a worker sends receipts in the background.

    uvicorn --app-dir docs/demo shop:app
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import random
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header
from pydantic import BaseModel, Field

from asgi_pprof import PprofMiddleware, Profile, labels

ProductId = Annotated[int, Field(ge=0, lt=1000)]


class Product(BaseModel):
    id: ProductId
    name: str
    price_cents: int


class Order(BaseModel):
    product_id: ProductId
    quantity: int = 1


COLOURS = "red green blue black white grey brown pink gold silver".split()
NOUNS = "kettle lamp chair table clock basket pillow mirror ladder broom".split()
CATALOGUE = [
    Product(id=i, name=f"{COLOURS[i % 10]} {NOUNS[i // 10 % 10]} {i}", price_cents=500 + 7 * i)
    for i in range(1000)
]
CACHED_PAGES = 2000  # of about 4 kB

stock_lock = asyncio.Lock()
pages: OrderedDict[tuple[int, int], bytes] = OrderedDict()
receipts: asyncio.Queue[Order] = asyncio.Queue(maxsize=1000)
open_carts = Profile("shop.example/carts")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Send receipts while the shop is open."""
    clerk = asyncio.create_task(send_receipts(), name="receipts")
    yield
    clerk.cancel()


app = FastAPI(title="Shop", lifespan=lifespan)
# A shop this small allocates little, so it needs more samples than one in 512 KiB.
app.add_middleware(PprofMiddleware, memory_profile_rate=16 * 1024)


@app.get("/products/{product_id}")
async def show_product(product_id: ProductId, quantity: int = 1) -> Product:
    """Return a product and its price for this quantity. Uses CPU on the event loop."""
    product = CATALOGUE[product_id]
    price = apply_price_rules(product, quantity)
    cache_page(product, quantity)
    return product.model_copy(update={"price_cents": price})


@app.get("/search")
async def search(words: str, tenant: Annotated[str, Header()] = "nobody") -> list[Product]:
    """Return the ten products that fit best. Its CPU time is labelled with the tenant."""
    with labels(tenant=tenant):
        wanted = words.split()
        return sorted(CATALOGUE, key=lambda product: misfit(product, wanted))[:10]


@app.post("/orders")
async def place_order(order: Order) -> Product:
    """Take the product from the stock, wait for the payment, and queue the receipt."""
    product = CATALOGUE[order.product_id]
    open_carts.add(cart := object())
    try:
        async with stock_lock:
            await asyncio.sleep(0.01)  # the stock's database
        await pay()
    finally:
        open_carts.remove(cart)
    await receipts.put(order)
    return product


@app.get("/reports/{day}")
def report_sales(day: int) -> dict[str, str]:
    """Return the digest of a day's sales. Uses CPU on a thread of the pool."""
    return {"sha256": hashlib.sha256(write_sales(day).encode()).hexdigest()}


def apply_price_rules(product: Product, quantity: int) -> int:
    best = full = product.price_cents * quantity
    for rule in range(10_000):
        if quantity % (rule + 2) == 0 and product.id % 7 == rule % 7:
            best = min(best, full * (100 - rule % 30) // 100)
    return best


def cache_page(product: Product, quantity: int) -> None:
    if (product.id, quantity) not in pages:
        pages[product.id, quantity] = product.model_dump_json().encode().ljust(4000)
    if len(pages) > CACHED_PAGES:
        pages.popitem(last=False)


def misfit(product: Product, wanted: list[str]) -> int:
    return sum(word not in product.name for word in wanted)


async def pay() -> None:
    await asyncio.sleep(random.uniform(0.1, 0.4))  # the bank


async def send_receipts() -> None:
    while True:
        order = await receipts.get()
        hashlib.pbkdf2_hmac("sha256", order.model_dump_json().encode(), b"stamp", 500)
        await asyncio.sleep(0.005)  # the post office


def write_sales(day: int) -> str:
    sales, file = random.Random(day), io.StringIO()
    writer = csv.writer(file)
    for hour in range(24):
        writer.writerows((hour, sales.choice(NOUNS), sales.randrange(9000)) for _ in range(50))
    return file.getvalue()
