"""The screenshots of README and docs/studio.md: the studio over a model, driven in Debian's Chromium.

`python benchmarks/screenshots.py [--model emoji] [--out docs/studio]`

Starts `unclip serve` on a free port of 127.0.0.1, does what a user would on each tab, and keeps what the browser shows,
in a palette of 256 colours.
"""

import argparse
import io
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DESKTOP = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/studio"))
    parser.add_argument("--only", choices=sorted(SCENES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unclip", "serve", "--port", "0", "--model", options.model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            if not address:
                sys.exit("error: the server did not start")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
                for name, (scene, window) in SCENES.items():
                    if options.only in (None, name):
                        page = browser.new_context(**window).new_page()
                        page.set_default_timeout(180_000)
                        page.goto(f"{address}/app")
                        page.get_by_role("button", name="Draw", exact=True).wait_for()
                        scene(page)
                        keep(page, options.out / f"{name}.png")
                        page.context.close()
                browser.close()
        finally:
            server.terminate()


def keep(page: Page, file: Path) -> None:
    page.wait_for_function("() => [...document.images].every(e => e.complete)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # what fades has faded
    image = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}  {file.stat().st_size // 1024} KiB", flush=True)


def draw(page: Page, prompt: str, number: int = 1, seed: int = 0) -> None:
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.get_by_label("Number of images").first.fill(str(number))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Draw", exact=True).click()


def wait(page: Page, text: str | re.Pattern) -> None:
    page.locator(".status", has_text=text).wait_for()


def create(page: Page) -> None:
    draw(page, "a hamburger", 4)
    wait(page, "4 images are done")


def early(page: Page) -> None:
    draw(page, "three pears", 4)
    wait(page, re.compile(r"Drawing at 64 px: step ([4-9]|10) of"))  # a fast machine tells of some steps only


def blend(page: Page) -> None:
    page.get_by_role("tab", name="Blend").click()
    page.get_by_label("First prompt").fill("a red heart")
    page.get_by_label("Second prompt").fill("a hamburger")
    page.get_by_role("button", name="Blend", exact=True).click()
    wait(page, "6 images are done")
    page.locator("#place input[type=number]").fill("4")
    page.locator("#place input[type=number]").press("Enter")
    page.locator("#play").scroll_into_view_if_needed()


def inpaint(page: Page) -> None:
    draw(page, "a red heart")
    wait(page, "is done")
    page.get_by_role("button", name="Paint in it").click()
    page.locator("#editor canvas").first.wait_for()
    page.get_by_label("What the whole image should show").fill("a red heart with a yellow star")
    page.wait_for_timeout(3000)
    page.locator("#editor").get_by_label("Brush", exact=True).first.click()
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row in range(-24, 25, 6):
        page.mouse.move(x - 40, y + row)
        page.mouse.down()
        page.mouse.move(x + 40, y + row, steps=8)
        page.mouse.up()
    page.wait_for_timeout(1500)


def explore(page: Page) -> None:
    page.get_by_role("tab", name="Explore").click()
    page.locator("#explored textarea, #explored input").first.fill("a hamburger")
    page.get_by_role("button", name="Explore", exact=True).click()
    page.locator(".caption-label", has_text="1024 px").wait_for()


def phone(page: Page) -> None:
    draw(page, "a red heart")
    wait(page, "is done")


SCENES = {
    "create": (create, DESKTOP),
    "early": (early, DESKTOP),
    "blend": (blend, DESKTOP),
    "inpaint": (inpaint, DESKTOP),
    "explore": (explore, DESKTOP),
    "phone": (phone, PHONE),
}

if __name__ == "__main__":
    main()
