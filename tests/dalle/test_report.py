"""One page tells a run: all of it, from any state of it, whatever its texts say, and a real browser agrees."""

import base64
import html.parser
import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.report import escaped, report, webp
from dvae import artefact, lit
from dvae.errors import ArtefactError
from dvae.errors import report as exit_code
from dvae.images import save
from dvae.tokenizer import load as load_dvae

METRICS = {
    "dvae": "step,train/loss,val/loss,val/psnr,codebook/used,codebook/perplexity\n1,3,,,,\n2,2,1.5,20.25,0.75,9.5\n"
    "4,1,1.75,21.25,0.5,8.5\n",
    "dalle": "step,train/image_loss,val/loss,val/image_loss\n1,3,,\n2,2,1.5,1.625\n4,1,1.75,1.875\n",
}
PICTURES = {"dvae": ("reconstructions", "codebook"), "dalle": ("samples",)}
MAGENTA, GREEN = (255, 0, 254), (0, 254, 1)
HOSTILE = [
    "<script>document.title = 'caught'</script>",
    '"><img src=x onerror="document.title = \'caught\'">',
    "</li></ol></style></title><svg onload=document.title='caught'>",
    "left \u202eright\u202c \u2066 \u200f\u061c over",
    "a\0b \x1b[31m \x07 bell",
    "x" * 10_000,
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 woman \U0001f469\U0001f3fd\u200d\U0001f680",
    "javascript:alert(1) &amp; &#60;b&#62; ' ` {{7*7}} ${7*7}",
]


def plain(colour, side=48):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, side, side)


@pytest.fixture
def run(tmp_path, tiny_dvae, tiny_dalle):
    """run("dvae"): a run folder of that stage as a training leaves it, validated after updates 2 and 4."""

    def make(kind, folder=None):
        folder = folder or tmp_path / kind
        artefact.copy({"dvae": tiny_dvae, "dalle": tiny_dalle / "model"}[kind], folder / "model")
        (folder / "metrics.csv").write_text(METRICS[kind])
        (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\nseed_everything: 77\n")
        (folder / "samples").mkdir()
        for name in PICTURES[kind]:
            for update, colour in ((2, MAGENTA), (4, GREEN)):
                save(plain(colour), folder / "samples" / f"{name}-{update:07d}.png")
        if kind == "dalle":
            (folder / "samples" / "prompts.txt").write_text("1: a red circle\n2: a blue square\n")
        lit.keep_versions(folder, 0)
        return folder

    return make


class Page(html.parser.HTMLParser):
    """What an HTML page consists of."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes, self.words = text, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())

    def pictures(self):
        """The decoded pictures of the page that are no drawings."""
        found = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        kinds = [re.fullmatch(r"data:image/(webp|svg\+xml);base64,(.+)", source) for source in found]
        assert all(kinds), "every picture lies in the page itself"
        return [Image.open(io.BytesIO(base64.b64decode(m[2]))) for m in kinds if m[1] == "webp"]


def written(run_folder, *options):
    report(str(run_folder), *options)
    path = Path(options[0]) if options else run_folder / "report.html"
    assert path.stat().st_size < 8_000_000
    return Page(path.read_text())


def assert_contained(page):
    """Nothing from outside, nothing that runs."""
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "a", "audio", "video"} & {*page.tags}
    rules = dict(
        rule.split(" ", 1) for tag, name, value in page.attributes if name == "content" and "default-src" in value
        for rule in value.split("; ")
    )  # fmt: skip
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    assert rules["style-src"].startswith("'sha256-")
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name != "style", (tag, name)
        if name in ("src", "srcset", "href", "action", "data", "poster"):
            assert value.startswith("data:image/"), (tag, name, value[:50])
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("kind", METRICS)
def test_the_page_of_a_run_shows_all_of_it(kind, run):
    page = written(run(kind))
    assert_contained(page)
    title = {"dvae": "Stage 1: the image tokenizer", "dalle": "Stage 2: the transformer"}[kind]
    assert title in page.said and page.said.count("Stage ") == 1
    assert "best, update 2" in page.said and "last, update 4" in page.said and "1.500" in page.said
    assert "The loss has risen since its best" in page.said and "2 (best)" in page.said
    assert "seed_everything: 77" in page.said and torch.__version__ in page.said
    assert "Atlas of the codes" in page.said and "16 codes" in page.said
    colours = [picture.getpixel((5, 5)) for picture in page.pictures()]
    assert colours.count(MAGENTA) == colours.count(GREEN) == len(PICTURES[kind])
    assert ("a red circle" in page.said) == (kind == "dalle")
    checked = [place for place, (tag, name, _) in enumerate(page.attributes) if name == "checked"]
    assert len(checked) == len(PICTURES[kind]), "one of each row is shown, the best"
    assert all(page.attributes[place - 1][2].endswith("-2") for place in checked)
    assert page.tags.count("source") == len([t for t in page.tags if t == "picture"]) > 1, "light and dark curves"
    assert 'class="missing"' not in page.text


def test_a_demo_is_both_stages_and_its_results(run, tmp_path):
    run("dvae"), run("dalle")
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "trials": 400}
    kinds = {"seen": share, "held-out": share | {"value": 0.125}}
    captions = {kind: {"single sample": value, "best of 16 by pmi": value} for kind, value in kinds.items()}
    demo = {"chosen": {"ranker": "pmi", "guidance": 1.5}, "reconstructions": kinds, "captions": captions}
    (tmp_path / "report.json").write_text(json.dumps(demo))
    save(plain((9, 8, 7)), tmp_path / "samples.png")
    page = written(tmp_path)
    assert_contained(page)
    said = page.said
    assert said.index("Results") < said.index("Stage 1: ") < said.index("Stage 2: ")
    assert "400 captions" in said and "50.0 [25.0, 75.0]" in said and "12.5 [25.0, 75.0]" in said
    assert "<b>best of 16 by pmi</b>" in page.text
    assert said.count("Atlas of the codes") == 1
    assert (9, 8, 7) in [picture.getpixel((5, 5)) for picture in page.pictures()]

    shutil.rmtree(tmp_path / "dvae")
    (tmp_path / "dalle" / "metrics.csv").unlink()
    for broken in ("", "[]", "{}", "null", '{"chosen": 3}', json.dumps(demo | {"captions": {"seen": [1]}})):
        (tmp_path / "report.json").write_text(broken)
        assert "report.json is not the report of a demo" in written(tmp_path).said
    assert "Stage 1" not in written(tmp_path).said


def test_the_file_is_where_it_was_asked_for(run, tmp_path, capsys):
    folder = run("dvae")
    written(folder, str(tmp_path / "new" / "page.html"))
    assert not (folder / "report.html").exists()
    assert f"wrote {tmp_path / 'new' / 'page.html'}, 0." in capsys.readouterr().out
    written(folder)
    assert (folder / "report.html").exists()


def test_curves_go_on_across_resumes_and_each_start_is_noted(run):
    folder = run("dvae")
    lit.keep_versions(folder, 4)
    lit.keep_versions(folder, 2)  # went back to an earlier checkpoint: what came later is forgotten
    assert [entry["update"] for entry in json.loads((folder / "versions.json").read_text())] == [0, 2]
    assert "One row for each time" in written(folder).said
    (folder / "versions.json").write_text("{")
    assert "versions.json cannot be read" in written(folder).said
    (folder / "versions.json").unlink()
    assert "2.6.6" in written(folder).said.split("Versions")[1], "of an older run: what its config says"


# ------------------------------------------------------------------------------------------------- any state of a run


def spoiled(folder, how):
    """Bring a run folder into some state; returns what the page must say of it."""
    if how == "nothing yet":
        for name in ("model", "samples"):
            shutil.rmtree(folder / name)
        (folder / "metrics.csv").unlink()
        return "There is no trained model to look into"
    if how == "empty metrics":
        (folder / "metrics.csv").write_text("step,train/loss\n")
        return "metrics.csv holds no numbers yet"
    if how == "no model yet":
        shutil.rmtree(folder / "model")
        return "There is no trained model to look into"
    if how == "damaged model":
        weights = next((folder / "model").glob("weights-*"))
        weights.write_bytes(weights.read_bytes()[:-1])
        return "is damaged"
    if how == "another version":
        manifest = json.loads((folder / "model" / "artefact.json").read_text())
        (folder / "model" / "artefact.json").write_text(json.dumps(manifest | {"format": 99}))
        return "has format 99, newer than this program reads"
    if how == "half a picture":
        path = next((folder / "samples").glob("*-0000004.png"))
        path.write_bytes(path.read_bytes()[:60])
        return f"{path.name} cannot be shown"
    if how == "bytes that are no text":
        for name in ("metrics.csv", "config.yaml", "samples/prompts.txt", "versions.json"):
            (folder / name).write_bytes(b"1: \xff\xfe\0step,\x80\n" * 3)
        return "metrics.csv holds no numbers yet"
    if how == "a long config":
        (folder / "config.yaml").write_text("x: 1\n" * 100_000)
        return "config.yaml is long: only its first 60,000 bytes are shown"
    assert how == "no pictures"
    shutil.rmtree(folder / "samples")
    return "Curves"


STATES = [
    *("nothing yet", "empty metrics", "no model yet", "damaged model", "another version", "half a picture"),
    *("bytes that are no text", "a long config", "no pictures"),
]


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("how", STATES)
def test_any_state_of_a_run_is_a_clear_page(kind, how, run):
    folder = run(kind)
    sentence = spoiled(folder, how)
    page = written(folder)
    assert_contained(page)
    assert sentence in page.said
    known = how != "nothing yet"
    assert (f"Stage {1 + (kind == 'dalle')}: " in page.said) == known


def test_a_model_folder_alone_is_a_page(tiny_dalle, tmp_path):
    page = written(tiny_dalle / "model", str(tmp_path / "page.html"))
    assert_contained(page)
    assert "Stage 2: the transformer" in page.said and "There is no metrics.csv" in page.said


IMPORTED = {
    "imported": "the tokenizer of <b>others</b> (example.org/them)",
    "licence": "MIT, by & for all",
    "encoder": {"file": "encoder.pkl", "sha256": "0" * 64},
    "decoder": {"file": "<i>decoder.pkl", "sha256": "1" * 64},
}


def test_an_imported_tokenizer_is_no_training_and_lacks_nothing_of_one(tiny_dvae, run, tmp_path):
    load_dvae(tiny_dvae).save(tmp_path / "model", IMPORTED)
    page = written(tmp_path)
    assert_contained(page)
    assert "<p>An imported image tokenizer</p>" in page.text and "training" not in page.said
    origin = "Imported: the tokenizer of <b>others</b> (example.org/them) ; licence: MIT, by & for all ; from:"
    assert f"{origin} encoder.pkl , <i>decoder.pkl ." in page.said and "<b>others" not in page.text
    assert 'class="missing"' not in page.text and "Atlas of the codes" in page.said
    assert "16 codes paints in 4 x 4 cells" in page.said

    load_dvae(tiny_dvae).save(tmp_path / "half" / "model", {"imported": 3})
    assert "Imported: 3 ; licence: not known ." in written(tmp_path / "half").said

    run("dalle", tmp_path / "both" / "dalle")  # a demo's folder, with somebody else's first stage
    artefact.copy(tmp_path / "model", tmp_path / "both" / "dvae" / "model")
    both = written(tmp_path / "both")
    assert "<p>An imported image tokenizer. A training of the transformer</p>" in both.text
    assert 'class="missing"' not in both.text


@pytest.mark.parametrize("where", ["empty", "missing", "file"])
def test_what_is_no_run_is_an_error_of_one_line(where, tmp_path, capsys):
    path = tmp_path / where
    path.mkdir() if where == "empty" else path.touch() if where == "file" else None
    assert exit_code(lambda: report(str(path), str(tmp_path / "page.html"))) == ArtefactError.code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nhint: " in said and said.count("\n") == 2
    if where == "empty":
        assert said == (
            f"error: there is no run in {path}\nhint: give what dvae fit, dalle fit or dalle demo has written\n"
        )
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_of_the_environment(run, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert exit_code(lambda: report(str(run("dvae")), str(tmp_path / "taken"))) == 5
    assert capsys.readouterr().err.startswith("error: ")


def test_many_validations_are_thinned_and_the_page_says_so(run):
    folder, chance = run("dvae"), torch.Generator().manual_seed(0)
    for update in range(10, 310, 10):  # noise cannot be compressed: 270 kB a picture
        noise = torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8, generator=chance)
        save(noise, folder / "samples" / f"reconstructions-{update:07d}.png")
        shutil.copy(folder / "samples" / "codebook-0000002.png", folder / "samples" / f"codebook-{update:07d}.png")
    page = written(folder)
    assert page.said.count("12 of 32 validations are shown") == 2
    assert len(page.pictures()) == 12 + 12 + 1
    for kind in "abcdefg":
        save(plain((1, 2, 3), 8), folder / "samples" / f"{kind}-0000001.png")
    assert "Only 6 of 9 kinds of pictures are shown" in written(folder).said
    shutil.rmtree(folder / "samples")
    columns = [f"train/c{k}" for k in range(20)]
    (folder / "metrics.csv").write_text(f"step,{','.join(columns)}\n1{',1' * 20}\n2{',2' * 20}\n")
    page = written(folder)
    assert "16 of 20 quantities are drawn" in page.said and page.tags.count("picture") == 16


def test_a_picture_is_exact_if_it_can_be_and_small_if_it_must():
    smooth = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    noise = torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8)

    def decoded(source):
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))

    source, width, height = webp(smooth, 50_000)
    assert (width, height) == (64, 64)
    assert np.array_equal(np.array(decoded(source).convert("RGB")), smooth.permute(1, 2, 0).numpy())
    source, width, height = webp(noise, 5_000)
    assert (width, height) == (300, 300) and len(source) < 5_000 * 4 / 3 + 50
    assert decoded(source).width < 300
    assert webp(noise[:, :1, :1], 1)[0].startswith("data:image/webp;base64,"), "an end, whatever is asked"


# ------------------------------------------------------------------------------------------------------ hostile texts


def test_escaping_shows_what_would_be_hidden():
    assert escaped("<a href='x'>\"&") == "&lt;a href=&#x27;x&#x27;&gt;&quot;&amp;"
    assert escaped("a\u202eb\0c\ud800\x9b") == "a[U+202E]b[U+0000]c[U+D800][U+009B]"
    assert escaped("a\nb") == "a[U+000A]b" and escaped("a\nb", lines=True) == "a\nb"
    assert escaped("x" * 10_000) == "x" * 200 + "\u2026 (10,000 letters)"
    family = "\U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd e\u0301 a\u00a0b"
    assert escaped(family) == family


@pytest.fixture
def hostile(run, tmp_path):
    """A run whose every text is hostile; its pictures are a magenta and a green square."""
    folder = run("dalle", tmp_path / "<script>document.title='caught'<\u2044script>")
    script = HOSTILE[0].replace("\n", " ")
    lines = "".join(f"{row}: {caption}\n" for row, caption in enumerate(HOSTILE, 1))
    (folder / "samples" / "prompts.txt").write_text(lines)
    (folder / "config.yaml").write_text(f"</pre></details>{script}\n" + lines)
    (folder / "metrics.csv").write_text(METRICS["dalle"].replace("train/image_loss", "</svg>" + script))
    (folder / "versions.json").write_text(json.dumps([{"update": script, script: "</td>" + script, "x": HOSTILE}]))
    for colour in (MAGENTA, GREEN):
        save(plain(colour), folder / "samples" / f"'onload=alert(1)<b>-{colour[0]:07d}.png")
    manifest = json.loads((folder / "model" / "artefact.json").read_text())
    manifest["about"] = {"step": script, script: HOSTILE, "val/psnr": "</dd>" + script, "split": {"hold_out": script}}
    (folder / "model" / "artefact.json").write_text(json.dumps(manifest))
    return folder


def test_hostile_texts_are_shown_and_run_nothing(hostile, tmp_path):
    page = written(hostile, str(tmp_path / "page.html"))
    assert_contained(page)
    assert page.said.count("document.title = 'caught'") > 5
    assert "[U+202E]" in page.said and "[U+0000]" in page.said
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c\0\x1b]", page.text)
    assert "\U0001f469\U0001f3fd\u200d\U0001f680" in page.text
    assert "(10,000 letters)" in page.said


# ------------------------------------------------------------------------------------------------------ a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian: apt-get install chromium")


def browse(page, folder, *options):
    """Open a file in a browser of its own; returns what it wrote."""
    call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    call += [f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(call, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode(errors="replace")


def title(dom):
    return re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]


@pytest.fixture
def listening():
    """A local server that notes what it is asked for: (its address, the paths)."""
    asked = []

    class Noting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@BROWSER
def test_a_browser_runs_and_fetches_nothing_of_a_hostile_run(hostile, tmp_path, listening):
    address, asked = listening
    leak = f"<img src='{address}/leak.png'><link rel=stylesheet href='{address}/leak.css'>"
    attack = f"<script>document.title = 'caught'</script>{leak}"
    with open(hostile / "samples" / "prompts.txt", "a") as file:
        file.write(f"9: {attack}\n")
    path = tmp_path / "page.html"
    report(str(hostile), str(path))
    naked, guarded = tmp_path / "naked.html", tmp_path / "guarded.html"
    naked.write_text(f"<!doctype html><title>plain</title>{attack}")
    # even if the escaping failed: the page's own rules forbid it
    guarded.write_text(path.read_text().replace("<header>", f"{attack}<header>"))

    assert title(browse(naked, tmp_path, "--dump-dom")) == "caught", "this browser runs scripts"
    assert asked and {path.split("?")[0] for path in asked} == {"/leak.png", "/leak.css"}
    asked.clear()
    for page in (path, guarded):
        dom = browse(page, tmp_path, "--dump-dom")
        assert "caught" in title(dom) and title(dom).startswith("&lt;script&gt;"), "the folder's name, as a text"
        assert dom.count("<script>") == (page == guarded)
    assert asked == []


@BROWSER
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_every_picture(run, tmp_path, width):
    folder = run("dalle")
    # all frames at once, as without styles: an open page cannot be asked by script, for it allows none
    report(str(folder), str(tmp_path / "page.html"))
    shot = tmp_path / "shot.png"
    colours = []
    for page in ("page.html", "all.html"):
        text = (tmp_path / "page.html").read_text()
        if page == "all.html":
            text = re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
        (tmp_path / page).write_text(text)
        browse(tmp_path / page, tmp_path, f"--window-size={width},4000", f"--screenshot={shot}")
        picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert picture.shape[1] == width

        def share(colour, picture=picture):
            return int((np.abs(picture - np.array(colour)).max(2) <= 8).sum())

        colours.append({name: share(colour) for name, colour in {"magenta": MAGENTA, "green": GREEN}.items()})
        assert share((0x00, 0x72, 0xB2)) > 30 and share((0xD5, 0x5E, 0x00)) > 30, "curves"
    styled, bare = colours
    assert styled["magenta"] > 40 * 40 and styled["green"] == 0, "the best validation alone"
    assert bare["magenta"] > 40 * 40 and bare["green"] > 40 * 40


@BROWSER
def test_a_browser_that_likes_it_dark_gets_it_dark(run, tmp_path):
    report(str(run("dvae")), str(tmp_path / "page.html"))
    light = {}
    for dark in (False, True):
        options = ["--blink-settings=preferredColorScheme=0"] * dark
        browse(
            tmp_path / "page.html", tmp_path, "--window-size=900,1500", f"--screenshot={tmp_path / 'x.png'}", *options
        )
        picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
        light[dark] = picture.mean()
        line = (0x56, 0xB4, 0xE9) if dark else (0x00, 0x72, 0xB2)
        assert int((np.abs(picture.astype(int) - np.array(line)).max(2) <= 8).sum()) > 30, "its curves too"
    assert light[False] > 200 and light[True] < 90
