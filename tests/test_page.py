"""The search page in a real browser: words, pictures, clicks, filters, keys, phones, dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from jobs.demo.catalog import sample_rows
from tests.browser import WAIT_MILLISECONDS, chromium, serious_findings
from tests.catalogs import write_rows
from tests.serving import Shop, served

NUM_ROWS = 30


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("page")
    pictures = [row.image for row in sample_rows(NUM_ROWS)]
    # The last item has no picture: its words are shown.
    rows = [
        {"key": f"k{number:04d}", "image": picture if number < NUM_ROWS - 1 else None}
        for number, picture in enumerate(pictures)
    ]
    return Shop(folder, catalog=write_rows(folder / "catalog", rows), num_rows=NUM_ROWS)


@pytest.fixture(scope="module")
def url(shop: Shop) -> Iterator[str]:
    with served(shop.app()) as found:
        yield found


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, locale="en-GB")
    found = context.new_page()
    found.set_default_timeout(WAIT_MILLISECONDS)
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    # A refused script, style or request is a message; an answer of 4xx is one too, and no fault.
    found.on(
        "console",
        lambda said: faults.append(said.text) if "Content Security" in said.text else None,
    )
    found.on(
        "request",
        lambda sent: None if sent.url.startswith((url, "blob:")) else faults.append(sent.url),
    )
    yield found
    context.close()
    assert faults == []


def names(page: Page) -> list[str]:
    return page.locator(".card .name").all_inner_texts()


def ask(page: Page, words: str) -> None:
    page.get_by_role("searchbox").fill(words)
    page.get_by_role("searchbox").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("best first")


def test_words_find_pictures_and_the_address_says_what_was_asked(page: Page, url: str):
    page.goto(url)
    expect(page.get_by_role("heading", name="Search 30 items")).to_be_visible()
    assert serious_findings(page) == []
    page.locator("body").press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    ask(page, "red ring")
    assert set(names(page)[:3]) == {"red ring"}
    assert page.locator(".card .score").first.inner_text() == "1.000"
    image = page.locator(".card img").first
    expect(image).to_be_visible()
    assert image.evaluate("image => image.naturalWidth") > 0
    assert serious_findings(page) == []
    assert page.url == f"{url}/?text=red+ring"
    page.goto(page.url)
    expect(page.get_by_role("searchbox")).to_have_value("red ring")
    expect(page.locator(".card .name").first).to_have_text("red ring")


def test_a_click_finds_more_like_it_and_going_back_returns(page: Page, url: str):
    page.goto(f"{url}/?text=blue+cup")
    page.get_by_role("button", name="blue cup, score 1.000").first.click()
    expect(page.locator("#part-name")).to_have_text("Like k0001")
    assert "key=k0001" in page.url
    expect(page.get_by_role("status")).to_contain_text("best first")
    assert names(page)[0] == "blue cup"
    assert page.locator('[data-key="k0001"]').count() == 0
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("blue cup")
    expect(page.locator("#part")).to_be_hidden()


def test_a_picture_is_chosen_dropped_or_pasted(page: Page, url: str, tmp_path: Path):
    picture = tmp_path / "ring.png"
    picture.write_bytes(sample_rows(1)[0].image)
    page.goto(url)
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Search by a picture").click()
    chosen.value.set_files(picture)
    expect(page.locator("#part-name")).to_have_text("ring.png")
    expect(page.locator(".card .name").first).to_contain_text("ring")
    page.get_by_role("button", name="Remove: ring.png").click()
    for kind in ("drop", "paste"):
        page.evaluate(
            """async ([kind, bytes]) => {
                const brought = new DataTransfer();
                const content = [new Uint8Array(bytes)];
                brought.items.add(new File(content, `${kind}.png`, {type: "image/png"}));
                const event = kind === "drop"
                    ? new DragEvent("drop", {dataTransfer: brought, bubbles: true})
                    : new ClipboardEvent("paste", {clipboardData: brought, bubbles: true});
                document.body.dispatchEvent(event);
            }""",
            [kind, list(picture.read_bytes())],
        )
        expect(page.locator("#part-name")).to_have_text(f"{kind}.png")
        expect(page.locator(".card .name").first).to_contain_text("ring")
    page.locator("#file").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    expect(page.get_by_role("heading", name="That did not work")).to_be_visible()
    expect(page.locator("#state")).to_contain_text("notes.txt is no picture")


def test_filters_come_from_the_columns_and_can_be_shared(page: Page, url: str):
    page.goto(f"{url}/?text=ring")
    page.get_by_role("button", name="Filters").click()
    assert serious_findings(page) == []
    page.get_by_label("price, at most").fill("9")
    page.get_by_label("new", exact=True).select_option("yes")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".card")).to_have_count(3)
    assert set(page.locator(".card").evaluate_all("cards => cards.map(c => c.dataset.key)")) == {
        "k0000",
        "k0002",
        "k0004",
    }
    page.goto(page.url)
    expect(page.locator(".card")).to_have_count(3)
    page.get_by_role("button", name="Remove filter: price<=9").click()
    expect(page.locator(".card")).to_have_count(15)
    page.goto(f"{url}/?text=ring&where=price%3E1000")
    expect(page.get_by_role("heading", name="Nothing found")).to_be_visible()
    page.get_by_role("button", name="Clear the filters").click()
    expect(page.locator(".card")).to_have_count(24)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".card")).to_have_count(NUM_ROWS)


def test_bars_and_large_numbers_in_filters_arrive_as_they_were_written(page: Page, url: str):
    with page.expect_request(f"{url}/search") as sent:
        page.goto(
            f"{url}/?text=ring&where=name=a\\|b&where=name=c|d\\|e&where=stock>=9007199254740993"
        )
    assert sent.value.post_data_json["where"] == [
        {"column": "name", "operator": "eq", "value": "a|b"},
        {"column": "name", "operator": "in", "value": ["c", "d|e"]},
        {"column": "stock", "operator": "ge", "value": "9007199254740993"},
    ]
    page.locator("#filter-button").click()
    expect(page.get_by_label("name", exact=True)).to_have_value("a\\|b")


def test_a_picture_that_comes_late_does_not_replace_the_one_that_was_asked_for(
    page: Page, url: str, tmp_path: Path
):
    late: list[Route] = []
    page.route("**/items/k0004/thumbnail", lambda route: late.append(route))
    page.goto(f"{url}/?key=k0004")
    expect(page.locator("#part-name")).to_have_text("Like k0004")
    wanted = tmp_path / "wanted.png"
    wanted.write_bytes(sample_rows(9)[8].image)
    page.locator("#file").set_input_files(wanted)
    expect(page.locator("#part-name")).to_have_text("wanted.png")
    chosen = page.locator("#part-image").get_attribute("src")
    for route in late:
        route.continue_()
    with page.expect_response("**/columns"):
        page.evaluate("fetch('/columns')")
    page.wait_for_timeout(200)
    assert late
    assert page.locator("#part-image").get_attribute("src") == chosen


def test_keys_walk_through_the_results(page: Page, url: str):
    page.goto(f"{url}/?text=ring")
    expect(page.locator(".card").first).to_be_visible()
    page.get_by_role("searchbox").press("ArrowDown")
    expect(page.locator(".card").nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".card").nth(1)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Search 30 items")).to_be_visible()


def test_errors_say_what_the_service_says(page: Page, url: str, shop: Shop):
    page.goto(f"{url}/?key=nobody")
    expect(page.get_by_role("heading", name="This cannot be searched")).to_be_visible()
    expect(page.locator("#state")).to_contain_text("key 'nobody' is not in the store")
    assert serious_findings(page) == []
    page.goto(f"{url}/?text=boom")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark")])
def test_it_fits_a_phone_in_light_and_dark(
    browser: Browser, url: str, width: int, scheme: str, tmp_path: Path
):
    context = browser.new_context(
        viewport={"width": width, "height": 720}, color_scheme=scheme, has_touch=True
    )
    page = context.new_page()
    page.goto(f"{url}/?text=red+ring&where=price%3C100")
    expect(page.locator(".card").first).to_be_visible()
    page.get_by_role("button", name="Filters").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious_findings(page) == []
    small = "[...document.querySelectorAll('button, input:not([type=file])')]"
    heights = page.evaluate(f"{small}.filter(b => b.checkVisibility()).map(b => b.offsetHeight)")
    assert min(heights) >= 24  # WCAG 2.2, target size
    context.close()


def test_a_token_is_asked_for_once(browser: Browser, shop: Shop):
    with served(shop.app(token="secret")) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{url}/?text=red+ring")
        page.locator("#token-value").fill("wrong")
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_text("not the right one")).to_be_visible()
        assert serious_findings(page) == []
        page.locator("#token-value").fill("secret")
        page.locator("#token-value").press("Enter")
        expect(page.locator(".card img").first).to_be_visible()
        assert "secret" not in page.url
        context.close()


def test_one_of_several_embeddings_is_searched(browser: Browser, tmp_path: Path):
    shop = Shop(tmp_path)
    shop.among = ("image", "text")
    with served(shop.app()) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{url}/?text=red+ring")
        expect(page.get_by_label("Images")).to_be_checked()
        with page.expect_request(lambda sent: sent.url.endswith("/search")) as sent:
            page.get_by_label("Texts").check()
        assert sent.value.post_data_json["among"] == "text"
        assert page.url.endswith("&among=text")
        expect(page.locator(".card .words").first).to_have_text("red ring")  # it has no pictures
        page.reload()
        expect(page.get_by_label("Texts")).to_be_checked()
        context.close()


def test_the_documentation_needs_nothing_from_elsewhere(page: Page, url: str):
    page.goto(f"{url}/docs")
    expect(page.get_by_role("heading", name="Clipmill API")).to_be_visible()
    expect(page.locator("article").first).to_contain_text("/search")
    assert serious_findings(page) == []
