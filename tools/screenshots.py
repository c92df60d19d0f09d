#!/usr/bin/env python3
"""Makes the pictures of both pages for docs/: desktop and phone width, of a real daemon with the bundled model under its safety, while it draws.

    make && .venv/bin/python tools/screenshots.py [FOLDER]

Needs what the browser tests need (deploy/install-deps test). Each file stays below 150 kB.
"""
import importlib.util
import pathlib
import sys
import tempfile

from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 150_000
PROMPTS = ["a red apple", "a sunflower on a blue background", "a guitar on a yellow background", "a maple leaf", "a ghost on a purple background",
           "a teddy bear on a pink background", "a penguin on a light blue background", "a trophy on a purple background",
           "a mushroom on a green background"]

spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests/browser/conftest.py")
tests = importlib.util.module_from_spec(spec)
sys.modules["conftest"] = tests
spec.loader.exec_module(tests)


def shoot(page, path):
    """256 colours are enough for a page, and keep it small."""
    from PIL import Image
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LIMIT, f"{path} has {path.stat().st_size} bytes"
    print(path, path.stat().st_size)


def draw(page, prompt, size, steps, seed):
    for field, value in (("prompt", prompt), ("width", size), ("height", size), ("steps", steps), ("seed", seed)):
        page.fill("#" + field, str(value))
    page.click("#draw")


def public_page(browser, served, folder):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, color_scheme="light")
    page = context.new_page()
    page.goto(served.url + "/")
    page.locator("#draw:enabled").wait_for()
    for i, prompt in enumerate(PROMPTS):
        draw(page, prompt, 128, 20, 1)
        page.locator("#history li").nth(i).wait_for()
    draw(page, "a rocket on a black background", 128, 150, 1)
    page.locator("#way img[src^='blob:']").wait_for()
    tests.until(lambda: page.locator("#way progress").evaluate("(e) => e.value") > 0.5, "half of the steps", 60)
    shoot(page, folder / "page-desktop.png")
    page.keyboard.press("Escape")
    page.set_viewport_size(tests.PHONE)
    page.locator("#more").evaluate("(e) => { e.open = false; }")
    page.emulate_media(color_scheme="dark")
    page.locator("#history button").nth(2).click()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, folder / "page-phone.png")
    context.close()


def operator_page(browser, served, folder):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, color_scheme="light")
    page = context.new_page()
    page.goto(served.admin_url + "/")
    page.fill("#token", tests.TOKEN)
    page.keyboard.press("Enter")
    page.locator("#board").wait_for()
    held = [served.daemon.send({"prompt": "a cat", "size": size, "steps": steps, "seed": i}, f"request-{i}")
            for i, (size, steps) in enumerate((("256x256", 150), ("192x192", 100), ("128x128", 150), ("256x256", 150)))]
    page.locator("#jobs tr", has_text="request-3").wait_for()
    tests.until(lambda: page.locator("#jobs progress").first.evaluate("(e) => e.value") > 20, "twenty steps", 60)
    shoot(page, folder / "operator-desktop.png")
    page.set_viewport_size(tests.PHONE)
    page.emulate_media(color_scheme="dark")
    shoot(page, folder / "operator-phone.png")
    for sock in held:
        sock.close()
    context.close()


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as p:
        served = tests.Served(pathlib.Path(temporary), "--running", "2", policy=ROOT / "weights/safety/policy.json")
        browser = p.chromium.launch(**tests.chromium())
        try:
            public_page(browser, served, folder)
            operator_page(browser, served, folder)
        finally:
            browser.close()
            served.daemon.kill()


if __name__ == "__main__":
    main()
