"""The interactive figures, driven by keyboard in Chromium and compared with the
functions of the library."""

import json
import pytest, torch
from las_nb import LaSTransformer
from las_nb.attention import masked_softmax
from las_nb.locality import locality_kernel
from las_nb.smoothing import smooth_scores, smooth_weights
from pages import NBS, cells


@pytest.fixture
def page(site, browser):
    "The page, open; a script error or a request to elsewhere fails the test."
    p, faults = browser.new_page(), []
    p.on("pageerror", lambda e: faults.append(str(e)))
    p.on(
        "request", lambda r: faults.append(r.url) if r.url.startswith("http") else None
    )
    p.goto((site / "play.html").as_uri())
    yield p
    p.close()
    assert not faults


def stored(name):
    "The data of a figure, as the notebook stored it."
    text = next(
        "".join(o["data"]["text/markdown"])
        for c in cells(NBS / "play.ipynb")
        for o in c.get("outputs", [])
        if f"play-{name}" in str(o.get("data", {}).get("text/markdown", ""))
    )
    return json.JSONDecoder().raw_decode(
        text, text.index(f'"play-{name}"), ') + len(f'"play-{name}"), ')
    )[0]


def expected(data, alpha, window, order, centred, mean=0.0):
    s, i = torch.tensor(data["scores"], dtype=torch.float64) + mean, data["query"]
    e = (s * locality_kernel(torch.tensor([alpha], dtype=torch.float64), len(s))[0, i])[
        None
    ]
    seen = torch.arange(len(s)) <= i
    if order == "scores":
        return masked_softmax(smooth_scores(e, window, not centred), seen)[0]
    return smooth_weights(masked_softmax(e, seen), window, not centred)[0]


def weights(figure):
    return torch.tensor(
        json.loads(figure.get_attribute("data-weights")), dtype=torch.float64
    )


def test_row_follows_the_keyboard_and_the_library(page):
    figure, data = page.locator("#play-row"), stored("row")
    rate, window = figure.locator("[name=alpha]"), figure.locator("[name=window]")
    torch.testing.assert_close(weights(figure), expected(data, 0.2, 3, "scores", False))
    rate.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert rate.get_attribute("aria-valuetext") == "0.30"
    mean = figure.locator("[name=mean]")
    mean.focus()
    for key, value in (("ArrowLeft", -1.5), ("ArrowRight", 1.5)):
        for _ in range(3 if value < 0 else 6):
            page.keyboard.press(key)
        want = expected(data, 0.3, 3, "scores", False, value)
        torch.testing.assert_close(weights(figure), want)
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    torch.testing.assert_close(weights(figure), expected(data, 0.3, 3, "scores", False))
    window.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    for order in ("scores", "weights"):
        for side in ("back", "centred"):
            figure.locator(f"input[value={order}]").focus()
            page.keyboard.press("Space")
            figure.locator(f"input[value={side}]").focus()
            page.keyboard.press("Space")
            got = weights(figure)
            torch.testing.assert_close(
                got, expected(data, 0.3, 5, order, side == "centred")
            )
            moved = float(figure.get_attribute("data-moved"))
            words = figure.locator("p").inner_text()
            # on the row's weights, or by its scores
            leak = max(moved, got[data["query"] + 1 :].sum().item())
            assert (leak > 0.01) == (side == "centred") == ("LEAKS" in words), (
                order,
                side,
                words,
            )


def read_by_library(data, folder, grey, block, head, query):
    "Logits, and the weights of one query, of a stored model with weights as in the page."
    model = LaSTransformer.from_pretrained(NBS / "results" / folder)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
        values = (torch.tensor(grey).float() - data["mean"]) / data["std"]
        x = model.embed(values[None, :, None])  # (1, 64, 48)
        for b in model.blocks[: block - 1]:
            x = b(x)
        b = model.blocks[block - 1]
        weights = b.mixer.weights(b.norm1(x))[0, head, query, : query + 1]
        return model(values[None, :, None])[0], weights


def test_a_digit_is_read_as_the_library_reads_it(page):
    figure, data = page.locator("#play-digits"), stored("digits")
    assert sum(len(net["weights"]) for net in data["nets"].values()) < 1_000_000

    def agree(grey, block, head, query):
        for key, folder in (("las", "digits-las"), ("plain", "digits-plain")):
            said = json.loads(figure.get_attribute(f"data-{key}"))
            want = read_by_library(data, folder, grey, block, head, query)
            for got, wanted in zip((said["logits"], said["weights"]), want):
                torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-4, rtol=0)

    agree(data["digits"][3], 3, 1, 44)
    for name, key, times in (("block", "ArrowLeft", 2), ("query", "ArrowRight", 9)):
        figure.locator(f"[name={name}]").focus()
        for _ in range(times):
            page.keyboard.press(key)
    figure.locator("[name=digit]").focus()
    page.keyboard.press("ArrowRight")
    agree(data["digits"][4], 1, 1, 53)
    assert "It is a 4." in figure.locator("p").inner_text()
    # drawn: by keyboard, the first pixel and the one below it; by pointer, the last
    figure.locator("[name=clear]").click()
    picture = figure.locator(".picture")
    picture.focus()
    for key in (" ", "ArrowDown", " ", " "):
        page.keyboard.press(key)
    box = picture.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5)
    page.mouse.down()
    page.mouse.up()
    drawn = [0] * 64
    drawn[0], drawn[8], drawn[63] = 8, 16, 12
    agree(drawn, 1, 1, 53)
    assert "It is" not in figure.locator("p").inner_text()


def test_text_is_as_large_on_a_phone(page):
    "Text of figures is drawn at 11 pixels or more, none over another or outside."
    for width in (390, 1280):
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(100)
        for name in ("digits", "row", "cost"):
            boxes = page.locator(f"#play-{name} > svg[role=img] text").evaluate_all(
                """(texts) => texts.filter(t => t.textContent).map(t => {
                  const r = t.getBoundingClientRect();
                  const frame = t.ownerSVGElement.getBoundingClientRect();
                  const scale = frame.width / t.ownerSVGElement.viewBox.baseVal.width;
                  const size = parseFloat(getComputedStyle(t).fontSize) * scale;
                  const inside = r.left > frame.left - 1 && r.right < frame.right + 1
                    && r.bottom < frame.bottom + 1;
                  return [t.textContent, size, inside, r.left, r.top, r.right, r.bottom];
                })"""
            )
            assert len(boxes) > 8
            for text, size, inside, *_ in boxes:
                assert size >= 11 and inside, f"{name} at {width}: {text} {size:.0f}"
            for i, (a, *_, l, t, r, b) in enumerate(boxes):
                for c, *_, l2, t2, r2, b2 in boxes[:i]:
                    apart = l >= r2 or l2 >= r or t >= b2 - 3 or t2 >= b - 3
                    assert apart, f"{name} at {width}: {a} over {c}"


def test_tab_reaches_every_control(page):
    controls = (".play input[type=range]", ".play fieldset", ".play form button")
    count = sum(page.locator(c).count() for c in controls)
    seen = set()
    page.locator("#play-digits [name=digit]").focus()
    for _ in range(count + 5):
        seen.add(
            page.evaluate(
                "document.activeElement.closest('.play') ? document.activeElement.name "
                "?? 'picture' : ''"
            )
        )
        page.keyboard.press("Tab")
    assert len(seen - {"", "picture"}) == count == 13 and "picture" in seen


def test_cost_reads_the_measurements(page):
    figure, data = page.locator("#play-cost"), stored("cost")
    words = figure.locator("p")
    for c in data["cases"]:
        figure.locator(f"input[value='{c['max_rate']:g}']").check()
        at = figure.locator("[name=length]")
        at.evaluate(
            "(e, L) => { for (e.value = 0; ; e.value++) { e.dispatchEvent(new "
            "Event('input', {bubbles: true})); if "
            "(e.nextElementSibling.textContent.replace(/,/g, '') == L) break; if "
            "(e.value == e.max) throw 'no such length'; } }",
            c["L"],
        )
        ratio = c["ways"]["auto"]["seconds"] / c["ways"]["plain"]["seconds"]
        assert (
            float(figure.get_attribute("data-ratio")) == pytest.approx(ratio)
            and f"{c['L']:,}" in words.inner_text()
        )
    before = words.inner_text()
    figure.locator("input[value=memory]").focus()
    page.keyboard.press("Space")
    assert "MiB" in words.inner_text() != before


def test_still_pictures_where_no_script_runs(site, browser):
    context = browser.new_context(java_script_enabled=False)
    p = context.new_page()
    p.goto((site / "play.html").as_uri())
    for name in ("digits", "row", "cost"):
        still = p.locator(f"#play-{name} .still")
        assert (
            still.is_visible()
            and still.bounding_box()["width"] > 300
            and len(still.get_attribute("alt")) > 40
        )
    context.close()


def test_figures_in_light_and_dark(page):
    "Text and lines take the page's colour."
    for ground, ink in (("white", "rgb(20, 20, 20)"), ("#222", "rgb(240, 240, 240)")):
        page.evaluate(
            f"document.body.style.cssText = 'background: {ground}; color: {ink}'"
        )
        for name in ("digits", "row", "cost"):
            assert (
                page.locator(f"#play-{name} > svg[role=img] text").first.evaluate(
                    "e => getComputedStyle(e).fill"
                )
                == ink
            )
