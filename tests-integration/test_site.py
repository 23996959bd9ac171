"""The built site: its HTML, and where Chromium is installed the pages as a reader sees them."""

import inspect
import json
import re
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from queue import Empty, Queue
from shutil import which
from threading import Thread
from typing import Any, ClassVar

import pytest
from once import made_once

HERE = Path(__file__).parent
MODULES = ("lowbit_adam", "turboadam", "stochbf16", "optstate_wrap", "optstate_codecs")
MODULES += ("optstate_codecs.formats", "optstate_codecs.rules", "optstate_codecs.convert")
SEARCHED = ("paged", "8B", "FSDP")
WIDTHS = (1440, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 180
# readers get these from a function and do not make them
MADE_BY_OTHERS = ("Snapshot",)
NAMED = r"<b><code>(?:<span[^>]*>)?([^<]+)(?:</span>)?</code></b>"


def pages(site: Path) -> list[str]:
    """The addresses of all pages."""
    found = [path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")]
    return sorted("" if page == "." else f"{page}/" for page in found)


@pytest.fixture(scope="session")
def reference(site: Path) -> dict[str, str]:
    """The HTML of each documented object, up to the next one."""
    text = "".join(path.read_text() for path in sorted((site / "reference").rglob("index.html")))
    _, *parts = re.split(r'<h[2-6] id="([\w.]+)" class="doc doc-heading">', text)
    names = parts[::2]
    assert len(names) == len(set(names)) > 100, "an object is documented twice"
    return dict(zip(names, parts[1::2], strict=True))


def test_examples_are_code(reference: dict[str, str]) -> None:
    text = "".join(reference.values())
    assert "<blockquote>" not in text
    assert "&gt;&gt;&gt; " in text
    assert re.search(r'class="[^"]*highlight[^"]*">.{0,300}&gt;&gt;&gt; ', text, re.DOTALL)


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_is_described(module: str, reference: dict[str, str]) -> None:
    public = import_module(module)
    described = 0
    for name in public.__all__:
        value = getattr(public, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)) or name in MADE_BY_OTHERS:
            continue
        package = module.partition(".")[0]
        html = next(
            text
            for path, text in reference.items()
            if path.startswith(f"{package}.") and path.endswith(f".{name}")
        )
        sections = re.split(r'class="doc-section-title">(\w+):</span>', html)
        lists = dict(zip(sections[1::2], sections[2::2], strict=True))
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        text = lists.get("Parameters", "") + lists.get("Attributes", "")
        listed = {found.lstrip("*") for found in re.findall(NAMED, text)}
        parameters = inspect.signature(value).parameters.values()
        wanted = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        assert wanted <= listed, f"{module}.{name}: {sorted(wanted - listed)}"
        described += len(wanted)
    assert described > 0


def test_arguments_come_once_and_from_the_nearest_class(reference: dict[str, str]) -> None:
    def description(name: str, argument: str) -> str:
        (text,) = re.findall(rf"<b><code>{argument}</code></b>(.*?)</li>", reference[name], re.S)
        return re.sub(r"<[^>]+>|\s+", " ", text)

    eight, four = "lowbit_adam.AdamW8bit", "lowbit_adam.AdamW4bit"
    assert "multiplied by" in description(eight, "weight_decay")
    assert "coupled" in description("lowbit_adam.Adam8bit", "weight_decay")
    assert "multiplied by" in description(four, "weight_decay")
    assert "default 128" in description(four, "block_size")
    assert "default 2048" in description("lowbit_adam.AdamW8", "block_size")
    assert description(four, "formats") == description(eight, "formats")
    # what a class says that it does not take is not in its list
    assert "<code>eps</code></b>" not in reference["lowbit_adam.Lion8bit"]
    assert "<code>min_elements</code></b>" in reference["optstate_codecs.Int8"]


def test_search_index_has_what_people_look_for(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    for word in SEARCHED:
        found = [d["location"] for d in index["docs"] if re.search(rf"\b{word}\b", d["text"])]
        assert found, word


def test_pictures_are_there_and_described(site: Path) -> None:
    for page in pages(site):
        for tag in re.findall(r"<img[^>]+>", (site / page / "index.html").read_text()):
            source, alt = (re.search(rf'{key}="([^"]*)"', tag) for key in ("src", "alt"))
            assert source is not None
            assert alt is not None, f"{page}: {tag}"
            assert (site / page / source[1]).exists(), f"{page}: {tag}"
            assert alt[1], f"{page}: {tag}"


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    for page in pages(site):
        text = (site / page / "index.html").read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|icon)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)]


def test_colour_schemes_can_be_chosen(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert len(re.findall(r'<input [^>]*name="__palette"', text)) == 3
    assert (site / "assets" / "favicon.svg").exists()
    assert not list(site.rglob("*.py"))


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, with a watcher in each page, and takes the report of the check."""

    reports: ClassVar[Queue[Any]] = Queue()
    watcher = f"<script>{(HERE / 'site_watcher.js').read_text()}</script>"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.path == "/check.html":
            self.answer((HERE / "site_check.html").read_bytes())
        elif path.is_dir() and (path / "index.html").exists():
            text = (path / "index.html").read_text()
            self.answer(text.replace("<head>", f"<head>{self.watcher}", 1).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")
        self.reports.put(json.loads(body))

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="session")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser found on every page, in both widths."""
    browser = next(filter(None, map(which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder = made_once(tmp_path_factory, "seen", partial(look, browser, site))
    return json.loads((folder / "report.json").read_text())


def look(browser: str, site: Path, folder: Path) -> None:
    """Let a browser look at every page, and write its report into a folder."""
    asked = {"pages": pages(site), "widths": WIDTHS, "searched": SEARCHED}
    (site / "asked.json").write_text(json.dumps(asked))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking"]
    command += [f"http://127.0.0.1:{server.server_port}/check.html"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        report = Handler.reports.get(timeout=SECONDS)
    except Empty:
        pytest.fail(f"{browser}: no report within {SECONDS} s")
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
        server.server_close()
        (site / "asked.json").unlink()
    (folder / "report.json").write_text(json.dumps(report))


def test_browser_looked_at_every_page(seen: dict[str, Any], site: Path) -> None:
    looked = {(page["page"], page["width"]) for page in seen["pages"]}
    assert looked == {(page, width) for page in pages(site) for width in WIDTHS}


def test_browser_has_no_errors(seen: dict[str, Any]) -> None:
    assert [(p["page"], p["errors"]) for p in seen["pages"] if p["errors"]] == []


def test_nothing_lies_outside_the_screen(seen: dict[str, Any]) -> None:
    wide = [p for p in seen["pages"] if p["scrollWidth"] > p["width"] or p["outside"]]
    assert [(p["page"], p["width"], p["scrollWidth"], p["outside"]) for p in wide] == []


def test_search_finds_what_people_look_for(seen: dict[str, Any]) -> None:
    assert set(seen["found"]) == set(SEARCHED)
    assert all(seen["found"].values()), seen["found"]


def test_toggle_switches_to_dark_and_back(seen: dict[str, Any]) -> None:
    assert seen["schemes"] == [["default", "light"], ["slate", "dark"], ["default", "light"]]
