"""The shop owner's pages in a real browser: what is clicked, read aloud, and sent; with scripts and without."""

from __future__ import annotations

import re

import pytest
from browsers import axe_script, tab, violations
from served import save_shop, save_shop_run, serving

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "a-key-of-some-length"
PAGES = (
    *("/", "/search?q=item", "/customer?id=u1", "/products", "/product?id=i0", "/basket?item=i0&item=i1"),
    *("/new-product", "/never-shown", "/data", "/data?finding=repeats", "/data?finding=titles", "/sign-in"),
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return save_shop(tmp_path_factory.mktemp("shop") / "shop")


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory):
    return save_shop_run(tmp_path_factory.mktemp("run") / "run", shop)


@pytest.fixture(scope="module")
def client(browser, run, shop, tmp_path_factory, one_thread):
    with serving(run, tmp_path_factory.mktemp("store") / "store.sqlite", data=shop) as client:
        yield client


def heading(page, name):
    return page.get_by_role("heading", name=name)


def listed(page) -> list[str]:
    """The titles of the list of a basket or customer."""
    return page.get_by_role("list").filter(has=page.locator(".rank")).get_by_role("heading", level=3).all_inner_texts()


def test_from_a_customer_to_a_list_that_follows_every_click(browser, client):
    with tab(browser, client.url) as page:
        page.goto("/")
        page.get_by_role("searchbox", name="Customer or product").fill("u1")
        page.get_by_role("button", name="Search").click()
        page.get_by_role("link", name="u1", exact=True).click()
        heading(page, "Customer u1").wait_for()
        assert page.get_by_role("list", name="Why").first.inner_text().startswith("Bought ")
        page.get_by_role("link", name="What if they bought more?").click()
        status = page.get_by_role("status")
        status.get_by_text("The list for 5 products.").wait_for()
        # Whatever is kept in the window is gone with the page; it stays, as only the list is put in.
        page.evaluate("window.kept = true")
        before = listed(page)
        page.get_by_role("link", name=re.compile("^Add ")).last.click()
        status.get_by_text("The list for 6 products.").wait_for()
        assert listed(page) != before and page.url.count("item=") == 6
        assert page.evaluate("window.kept")
        page.get_by_role("link", name=re.compile("^Remove")).last.click()
        status.get_by_text("The list for 5 products.").wait_for()
        # What is typed is found without a button, and the field keeps the focus.
        field = page.get_by_role("searchbox", name="Product to add")
        field.press_sequentially("café")
        page.get_by_role("link", name="Add Thé & café").first.wait_for()
        page.wait_for_url(re.compile("q=caf"))
        assert field.evaluate("field => field === document.activeElement") and page.evaluate("window.kept")
        # The address is that of the list: going back and coming again show the same.
        page.reload()
        assert listed(page)[0] and page.get_by_role("searchbox", name="Product to add").input_value() == "café"
        page.get_by_role("link", name="Empty the basket").click()
        page.get_by_text("There is nothing to go by yet").wait_for()
        page.go_back()
        status.get_by_text("The list for 5 products.").wait_for()


def test_a_new_product_is_looked_at_and_then_stored(browser, run, shop, tmp_path):
    with serving(run, tmp_path / "store.sqlite", data=shop) as client, tab(browser, client.url) as page:
        page.goto("/new-product")
        page.get_by_label("Id", exact=True).fill("new")
        page.get_by_label("Title").fill("<script>alert(2)</script>")
        page.get_by_label("Photo").set_input_files(shop / "images" / "5.png")
        page.get_by_label("Colour").fill("red")
        page.evaluate("window.kept = true")
        page.get_by_role("button", name="Who would see it?").click()
        heading(page, "Who would see <script>alert(2)</script>").wait_for()
        assert page.get_by_text("customers would find it among the first 10").is_visible()
        photo = page.get_by_alt_text("Its photo, as it was sent")
        assert photo.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [60, 40]
        assert page.evaluate("window.kept") and client.service.store.last == 0
        page.get_by_role("button", name="Put it into the shop").click()
        page.get_by_role("status").get_by_text("It is in the shop now").wait_for()
        assert client.service.store.last == 1 and heading(page, "<script>alert(2)</script>").is_visible()
        page.goto("/basket?item=new")
        assert page.get_by_role("link", name="Remove <script>alert(2)</script>").is_visible()


def test_without_scripts_all_of_it_can_be_read_and_done(browser, run, shop, tmp_path):
    with (
        serving(run, tmp_path / "store.sqlite", data=shop, api_key=KEY) as client,
        tab(browser, client.url, java_script_enabled=False) as page,
    ):
        page.goto("/basket")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Sign in").click()
        heading(page, "What if somebody bought this?").wait_for()
        page.get_by_role("link", name=re.compile("^Add item")).first.click()
        page.get_by_text("The list for 1 product.").wait_for()
        page.get_by_role("searchbox", name="Product to add").fill("café")
        page.get_by_role("button", name="Find").click()
        page.get_by_role("link", name="Add Thé & café").first.click()
        page.get_by_text("The list for 2 products.").wait_for()
        page.get_by_role("link", name="New product").click()
        page.get_by_label("Id", exact=True).fill("new")
        page.get_by_label("Photo").set_input_files(shop / "images" / "5.png")
        page.get_by_role("button", name="Who would see it?").click()
        page.get_by_role("button", name="Put it into the shop").click()
        page.get_by_text("It is in the shop now").wait_for()
        assert client.service.store.find("item", ["new"])["new"].picture == (shop / "images" / "5.png").read_bytes()
        page.get_by_role("button", name="Sign out").click()
        page.goto("/customer?id=u1")
        assert heading(page, "Sign in").is_visible()


def test_everybody_can_read_it(browser, client):
    """Nothing that axe-core finds on any page; a mistake on purpose is found."""
    # Axe is brought in from outside the page, which the page itself forbids.
    script = axe_script()
    with tab(browser, client.url) as page:
        for path in PAGES:
            page.goto(path)
            page.evaluate(script)
            assert not violations(page), path
        page.evaluate("document.documentElement.lang = ''; document.querySelector('main p').style.color = '#bbb'")
        assert {name for name, _ in violations(page)} == {"html-has-lang", "color-contrast"}


def test_it_can_be_read_in_the_dark(browser, client):
    script = axe_script()
    with tab(browser, client.url, color_scheme="dark") as page:
        for path in ("/basket?item=i0&item=i1", "/new-product", "/data?finding=repeats"):
            page.goto(path)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 22)"
            page.evaluate(script)
            assert not violations(page, "{runOnly: ['color-contrast']}"), path


def test_keys_and_small_screens(browser, client):
    with tab(browser, client.url, viewport={"width": 340, "height": 700}) as page:
        for path in PAGES:
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
        page.goto("/basket")
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to content")
        assert skip.evaluate("link => link === document.activeElement && link.getBoundingClientRect().top >= 0")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        page.get_by_role("link", name=re.compile("^Add item")).first.focus()
        page.keyboard.press("Enter")
        page.get_by_role("status").get_by_text("The list for 1 product.").wait_for()
