"""The shop owner's pages as they come over HTTP, read and walked without scripts."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from html_page import Page, check_page, page
from PIL import Image
from served import COLOURS, DATA, same, save_run, save_shop, save_shop_run, serving

from hellm.cli import main
from hellm.data import DataError, IdMap
from hellm.serve.page import surveys
from hellm.serve.page.catalogue import Catalogue
from hellm.serve.page.reasons import reason_in_words

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "a-key-of-some-length"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return save_shop(tmp_path_factory.mktemp("shop") / "shop")


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory):
    return save_shop_run(tmp_path_factory.mktemp("run") / "run", shop)


@pytest.fixture(scope="module")
def client(run, shop, tmp_path_factory, one_thread):
    with serving(run, tmp_path_factory.mktemp("store") / "store.sqlite", data=shop) as client:
        yield client


PAGES = [
    *("/", "/?page=2", "/search", "/search?q=u1", "/search?q=script", "/search?q=nothing+like+it"),
    *("/customer?id=u1", "/products", "/product?id=i0", "/product?id=i2", "/basket", "/basket?item=i0&item=i1&q=item"),
    *(
        "/new-product",
        "/never-shown",
        "/data",
        "/data?finding=titles",
        "/data?finding=repeats",
        "/data?finding=pictures",
    ),
    *("/sign-in", "/customer?id=u99", "/data?finding=none", "/product", "/research"),
]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_nothing_from_elsewhere_and_runs_no_title(client, path):
    response = client.get(path, headers={"accept": "text/html"})
    assert response.status_code in (200, 404, 422)
    check_page(response)


def test_no_style_loads_anything():
    import hellm.serve.page

    styles = sorted(Path(hellm.serve.page.__file__).with_name("static").glob("*.css"))
    assert [one.name for one in styles] == ["research.css", "style.css"]
    for one in styles:
        assert not re.search(r"url\(|@import|//[a-z]", one.read_text(encoding="utf-8")), one


def test_every_answer_forbids_what_no_page_needs(client):
    for path in (
        "/",
        "/static/style.css",
        "/picture?id=i0",
        "/nothing",
        "/customer?id=u99",
        "/health/live",
        "/openapi.json",
    ):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' data:;")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "content-security-policy" in client.post("/recommend", {}).headers


def test_titles_are_texts(client):
    for path in ("/products", "/product?id=i0", "/basket?item=i0", "/search?q=script"):
        assert SCRIPT in page(client, path).text
    drawn = client.get("/picture", params={"id": "i1"}).text
    assert drawn.startswith("<svg") and ">T</text>" in drawn


def test_the_first_page(client):
    found = page(client, "/")
    assert found.of("h1") == ["Who buys here, and what they are shown"]
    assert dict(zip(found.of("dt"), found.of("dd"), strict=True)) == {
        "customers": "36", "products": "18", "purchases": f"{len(DATA.train[0])}"
    }  # fmt: skip
    assert found.links["u0"] == "/customer?id=u0" and found.links["Next"] == "/?page=2"
    assert "u6" in page(client, found.links["Next"]).links
    assert set(found.links) >= {"Shop", "Research", "Products", "What if", "New product", "Never shown", "Data"}


def test_a_customer_is_shown_what_the_api_answers(client):
    found = page(client, "/customer?id=u1")
    answer = same(client.post("/recommend", {"users": ["u1"], "explain": 2}))["lists"][0]
    assert [one.partition(" ")[0] for one in found.of("h3")] == [
        (one["title"] or "No").partition(" ")[0] for one in answer["items"]
    ]
    listed = [one["href"] for one in found.attributes("a") if (one.get("tabindex") == "-1")]
    assert listed == [f"/product?id={one['item']}" for one in answer["items"]]
    for item in answer["items"]:
        for reason in item["reasons"]:
            assert f"Bought {reason['title'] or 'No title ' + reason['item']}: {reason_in_words(reason)}." in found.text
    history = same(client.get("/users/u1/history"))["items"]
    assert f"Bought {len(history)}, the last first" in found.text
    bought = [
        one["href"].removeprefix("/product?id=") for one in found.attributes("a") if one["href"].startswith("/product?")
    ]
    assert bought[: len(history)] == [one["item"] for one in history[::-1]]
    assert found.links["What if they bought more?"] == "/basket?" + "&".join(f"item={one['item']}" for one in history)


def test_somebody_unknown_is_told_with_the_nearest(client):
    found = page(client, "/customer?id=u111", 404)
    assert found.of("h1") == ["Not found"]
    assert "unknown customer 'u111'" in found.text.lower() and "u11" in found.of("code")
    assert "Id: Field required." in page(client, "/product", 422).text
    # Where htmx asked for a part, the whole takes its place.
    assert found.response.headers["hx-retarget"] == found.response.headers["hx-reselect"] == "#content"


def test_reasons_in_words():
    link = {"similarity": 0.9, "shared_hyperedges": 2}
    apart = {"similarity": 0.1, "shared_hyperedges": 0}
    words = {
        (0, ()): "near each other in what the model has learnt",
        (1, ()): "1 customer has both",
        (1200, ("image",)): "1,200 customers have both, alike in picture",
        (0, ("text", "image", "brand")): "alike in words, picture and brand",
    }
    for (shared, alike), text in words.items():
        content = {name: link for name in alike} | {"audio": apart}
        assert reason_in_words({"shared_users": shared, "content": content}) == text
    assert reason_in_words({"shared_users": 0, "content": None}) == words[0, ()]


def test_the_basket_ranks_anew_at_each_link(client):
    found = page(client, "/basket")
    assert "There is nothing to go by yet" in found.text
    chosen = []
    for number in range(3):
        title, address = next((text, to) for text, to in found.links.items() if text.startswith("Add item"))
        found = page(client, address)
        chosen.append(re.findall(r"item=(i\d+)", address)[-1])
        answer = same(client.post("/recommend", {"histories": [chosen]}))["lists"][0]
        added = [one["href"] for one in found.attributes("a") if one.get("class") == "action"]
        assert [re.findall(r"item=(i\d+)", to)[-1] for to in added[-len(answer["items"]) :]] == [
            one["item"] for one in answer["items"]
        ]
        assert f"Remove {title.removeprefix('Add ')}" in found.links
        assert f"The list for {number + 1} product" in found.text
    # Where the items stood before the last was added.
    before = same(client.post("/recommend", {"histories": [chosen[:-1]], "k": 18}))["lists"][0]["items"]
    place = {one["item"]: rank for rank, one in enumerate(before, 1)}
    expected = []
    for rank, one in enumerate(answer["items"], 1):
        old = place[one["item"]]
        expected += [f"up {old - rank}"] if old > rank else [f"down {rank - old}"] if old < rank else []
    assert [text for text in found.of("span") if re.fullmatch(r"(up|down) \d+", text)] == expected != []
    assert page(client, found.links["Empty the basket"]).text.count("Remove") == 0
    assert "i99" in page(client, "/basket?item=i99", 422).text


def test_the_search_finds_ids_and_words(client):
    assert page(client, "/search?q=u1").links["u1"] == "/customer?id=u1"
    assert [one for one in page(client, "/search?q=U3").links if one.startswith("u3")] == [
        "u3",
        *(f"u3{n}" for n in range(6)),
    ]
    found = page(client, "/search", params={"q": "CAFÉ thé"}).links
    assert found["Thé & café"] == "/product?id=i1"
    assert page(client, "/search?q=i17").links["item 17"] == "/product?id=i17"
    assert "No customer and no product" in page(client, "/search?q=%3Cb%3E").text


def test_a_product_and_who_is_shown_it(client):
    found = page(client, "/product?id=i5")
    lists = same(client.post("/recommend", {"users": [f"u{row}" for row in range(36)]}))["lists"]
    shown = [one for one in lists if any(item["item"] == "i5" for item in one["items"])]
    assert f"{len(shown)} of 36 customers find it among the first 10" in found.text
    assert "colour blue" not in found.text and "bought" in found.of("dt")
    alike = same(client.get("/items/i5/similar"))["items"]
    assert all(f"/product?id={one['item']}" in [a["href"] for a in found.attributes("a")] for one in alike)


def test_pictures_are_made_here_and_asked_for_by_id(client, shop):
    answer = client.get("/picture", params={"id": "i0"})
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.format == "WEBP" and picture.size == (60, 40)
    assert answer.headers["content-type"] == "image/webp" and "private" in answer.headers["cache-control"]
    # None, none that can be read, and nothing that is no item.
    for item in ("i2", "i3"):
        drawn = client.get("/picture", params={"id": item})
        assert drawn.headers["content-type"] == "image/svg+xml" and "secret" not in drawn.text
    for item in ("../items.csv", str(shop / "images" / "0.png"), "images/0.png", "i99"):
        assert client.get("/picture", params={"id": item}).status_code == 404
    assert client.get("/picture", params={"id": "i0", "size": "9999"}).status_code == 422


def test_large_pictures_become_small():
    from hellm.serve.page.pictures import SIDES, Pictures, small_picture

    content = io.BytesIO()
    Image.new("RGB", (2400, 1200), "red").save(content, "JPEG")
    made = small_picture(content, SIDES["small"])
    with Image.open(io.BytesIO(made.content)) as picture:
        assert picture.size == (256, 128)
    # Only so many bytes are kept, the last ones.
    pictures = Pictures(None, None)
    for number in range(5):
        pictures._keep((str(number), "small"), made._replace(content=bytes(30 << 20)))
    assert list(pictures._kept) == [("3", "small"), ("4", "small")]
    pictures.close()


def product(shop: Path, **fields: str) -> dict:
    sent = {"id": "new", "title": "A <b>new</b> one", "attribute:colour": "red", **fields}
    return {"data": sent, "files": {"picture": ("a.png", (shop / "images" / "5.png").read_bytes())}}


def test_a_look_at_a_new_product_stores_nothing_and_the_button_does(run, shop, tmp_path):
    with serving(run, tmp_path / "store.sqlite", data=shop) as client:
        before = client.service.snapshot
        sent = product(shop)
        found = Page(client.http.post("/new-product", headers={"accept": "text/html"}, **sent))
        assert client.service.snapshot is before and client.service.store.last == 0
        assert client.get("/product?id=new").status_code == 404
        number = int(re.search(r"(\d+) of 36 customers would find it", found.text)[1])
        assert "Placed by image, colour." in found.text and "A <b>new</b> one" in found.text
        assert found.attributes("img")[1]["src"].startswith("data:image/webp;base64,")
        # The second form brings all that the first one did.
        fields = {one["name"]: one["value"] for one in found.attributes("input") if one.get("type") == "hidden"}
        stored = client.http.post("/new-product/store", data=fields)
        assert stored.status_code == 303 and stored.headers["location"] == "/product?id=new&stored=true"
        found = page(client, stored.headers["location"])
        assert "It is in the shop now" in found.text and client.service.store.last == 1
        assert f"{number} of 36 customers find it among the first 10" in found.text
        lists = same(client.post("/recommend", {"users": [f"u{row}" for row in range(36)]}))["lists"]
        assert number == sum(any(item["item"] == "new" for item in one["items"]) for one in lists) > 0
        # It is the item that the API would have stored, and once.
        entry = client.service.store.find("item", ["new"])["new"]
        assert entry.picture == (shop / "images" / "5.png").read_bytes()
        assert entry.body["attributes"] == {"colour": ["red"]} and entry.body["title"] == "A <b>new</b> one"
        assert client.http.post("/new-product/store", data=fields).status_code == 303 and client.service.store.last == 1
        assert client.get("/picture?id=new").headers["content-type"] == "image/webp"


def test_what_is_wrong_with_a_new_product_is_said_beside_the_form(client, shop):
    def refused(status: int, message: str, path: str = "/new-product", **sent) -> None:
        found = Page(client.http.post(path, **sent))
        assert found.response.status_code == status
        assert message in found.text, found.text
        given = next(one for one in found.attributes("input") if one.get("name") == "title")
        assert given["value"] == "A <b>new</b> one"

    refused(409, "Product 'i1' is in the shop already", **product(shop, id="i1"))
    refused(409, "Item 'i1' is there already", "/new-product/store", **product(shop, id="i1"))
    refused(422, "Id: String should have at least 1 character", **product(shop, id=""))
    sent = product(shop) | {"files": {"picture": ("a.png", b"no picture")}}
    refused(422, "Must be a picture that can be read", **sent)
    refused(
        422,
        "An item must have something that the run knows items by",
        data=product(shop)["data"] | {"attribute:colour": ""},
    )
    refused(422, "The picture must be base64", data=product(shop)["data"] | {"picture64": "%"})
    assert client.service.store.last == 0


def test_a_run_or_a_server_that_takes_nothing_says_so(shop, tmp_path):
    with serving(save_run(tmp_path / "run", content=False)) as client:
        assert "This run cannot take new products" in page(client, "/new-product").text
        assert "started without the data of the run" in page(client, "/data").text
        assert client.get("/picture?id=i0").text.startswith("<svg")
    with serving(save_shop_run(tmp_path / "shop_run", shop)) as client:
        found = Page(client.http.post("/new-product", **product(shop)))
        assert "This server keeps nothing" in found.text and "Put it into the shop" not in found.of("button")


def test_never_shown_is_what_no_list_of_the_sample_has(client, monkeypatch):
    monkeypatch.setattr(surveys, "_LENGTH", 2)
    lists = client.recommender.recommend([f"u{user}" for user in range(36)], k=2)
    without = {f"i{row}" for row in range(18)} - {item.item for one in lists for item in one}
    client.app.state.shop.surveys._served = None
    found = page(client, "/never-shown")
    assert f"{len(without)} of 18 products" in found.text and "of none of all 36 customers" in found.text
    tiles = {one["href"].removeprefix("/product?id=") for one in found.attributes("a")}
    assert without <= tiles and without
    rows = dict(zip(found.of("th")[3:], [int(one) for one in found.of("td")[1::2]], strict=True))
    assert rows["in none"] == len(without) and sum(rows.values()) == 18

    # A sample: at most so many customers, and none begun after its time; how many is said.
    for name, value, asked in (("_CUSTOMERS", 5, 5), ("_SECONDS", 0.0, surveys._CHUNK)):
        with monkeypatch.context() as patched:
            patched.setattr(surveys, name, value)
            client.app.state.shop.surveys._served = None
            found = page(client, "/never-shown")
            users = np.random.default_rng(0).permutation(36)[:asked]
            lists = client.recommender.recommend([f"u{user}" for user in users], k=2)
            without = {f"i{row}" for row in range(18)} - {item.item for one in lists for item in one}
            assert f"{len(without)} of 18 products" in found.text
            assert f"a sample of {asked} customers of 36" in found.text
    client.app.state.shop.surveys._served = None


def test_findings_lead_to_their_rows(client):
    found = page(client, "/data")
    texts = {text.removeprefix("Show them: "): to for text, to in found.links.items() if text.startswith("Show them")}
    assert texts["1 items have no title"] == "/data?finding=titles"
    assert "/product?id=i2" in page(client, "/data?finding=titles").links.values()
    assert {"/product?id=i1", "/product?id=i2"} <= {*page(client, texts["2 items have no picture"]).links.values()}
    repeated = page(client, texts["1 events repeat an earlier user-item pair"])
    assert repeated.of("td") == ["u0", "item 3", "15 Jan 2027", "test"]
    assert repeated.links["u0"] == "/customer?id=u0" and repeated.links["item 3"] == "/product?id=i3"
    assert "1 events have times in the future" in found.text


def test_the_data_must_be_of_the_run(run, shop, tmp_path, capsys):
    catalogue = Catalogue.load(shop, IdMap(["i1"]))
    assert catalogue.facts("i99") == {} and catalogue.picture("i99") is None
    with pytest.raises(DataError, match="must be the data of the run, and holds none of its items"):
        Catalogue.load(shop, IdMap(["else"]))
    assert main(["serve", str(run), "--store", "none", "--data", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def signed_in(client, key: str = KEY, target: str = "/"):
    return client.http.post("/sign-in", data={"key": key, "next": target}, headers={"origin": client.url})


def test_a_browser_brings_the_key_by_a_form(run, shop, monkeypatch):
    with serving(run, data=shop, api_key=KEY) as client:
        html = {"accept": "text/html"}
        asked = client.get("/customer?id=u1", headers=html)
        assert asked.status_code == 303 and asked.headers["location"] == "/sign-in?next=%2Fcustomer%3Fid%3Du1"
        assert client.get("/customer?id=u1").status_code == 401
        # A part of a page was asked for: the whole of it must go.
        part = client.get("/basket", headers=html | {"hx-request": "true"})
        assert part.status_code == 401 and part.headers["hx-redirect"] == "/sign-in"
        for path in ("/picture?id=i0", "/products", "/research"):
            assert client.get(path, headers=html).status_code == 303
        assert client.get("/static/style.css").status_code == 200

        form = page(client, asked.headers["location"])
        fields = {one["name"]: one.get("value") for one in form.attributes("input")}
        assert fields["next"] == "/customer?id=u1" and "u1" not in form.text
        wrong = Page(signed_in(client, "another-key-of-length"))
        assert wrong.response.status_code == 401 and "This is not the key." in wrong.text
        right = signed_in(client, target=fields["next"])
        assert right.status_code == 303 and right.headers["location"] == "/customer?id=u1"
        cookie = right.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"} <= {one.strip() for one in cookie.split(";")}
        assert KEY not in cookie
        found = page(client, "/customer?id=u1")
        assert "Sign out" in found.of("button")
        same(client.post("/recommend", {"users": ["u1"]}))

        value = client.http.cookies["hellm"]
        client.http.cookies.clear()
        until, _, seal = value.partition(".")
        forged = f"{int(until) + 1}.{seal}", f"{until}.{seal[::-1]}", until, "", "é.é", f".{seal}"
        for bad in forged:
            assert client.get("/", headers={"cookie": f"hellm={bad}".encode()}).status_code == 401
        assert client.get("/", headers={"cookie": f"hellm={value}"}).status_code == 200
        # A clock that is set back by a second turns nobody away; one that was years ahead makes nothing good for years.
        for moment, status in ((-43201, 200), (1, 401), (-86400 * 365, 401)):
            now = int(until) + moment
            monkeypatch.setattr("hellm.serve.page.sign_in.time.time", lambda now=now: now)
            assert client.get("/", headers={"cookie": f"hellm={value}"}).status_code == status
        out = client.http.post("/sign-out", headers={"cookie": f"hellm={value}"})
        assert out.status_code in (303, 401)
    with serving(run, api_key=KEY + "x") as client:
        # Of the key before.
        assert client.get("/", headers={"cookie": f"hellm={value}"}).status_code == 401
        client.http.cookies.clear()
        signed_in(client, KEY + "x")
        gone = client.http.post("/sign-out")
        assert gone.headers["location"] == "/sign-in" and client.get("/").status_code == 401


def test_the_form_leads_nowhere_else_and_is_sent_from_here_only(run):
    with serving(run, api_key=KEY) as client:
        for target in ("https://evil.example", "//evil.example", "/\\evil.example", "evil", "/a\r\nb"):
            assert signed_in(client, target=target).headers["location"] == "/"
        client.http.cookies.clear()
        other = {"origin": "http://evil.example"}
        assert client.http.post("/sign-in", data={"key": KEY}, headers=other).status_code == 403
        assert "secure" not in signed_in(client).headers["set-cookie"].lower()
        host = client.url.removeprefix("http://")
        behind = client.http.post("/sign-in", data={"key": KEY}, headers={"origin": f"https://{host}"})
        assert "secure" in behind.headers["set-cookie"].lower()


def test_what_the_guard_refuses_is_a_page_for_a_person(run):
    with serving(run, max_body=1000) as client:
        large = client.http.post("/new-product", content=b"x" * 2000, headers={"accept": "text/html"})
        assert large.status_code == 413 and Page(large).of("h1") == ["This does not work"]
        client.app.state.readiness.is_ready = False
        early = page(client, "/", 503)
        assert early.of("h1") == ["Not now"] and early.response.headers["retry-after"] == "5"
        client.app.state.readiness.is_ready = True


def test_colours_are_offered(client):
    found = page(client, "/new-product")
    assert sorted(one["value"] for one in found.attributes("option")) == sorted(COLOURS)
