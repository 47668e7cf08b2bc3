"""The `sample` command: prompts -> ranked pictures on disk, a labelled sheet, and a JSON of how they were made."""

import itertools
import re
import tempfile
import unicodedata
from pathlib import Path

from tqdm import tqdm

from dalle import pipeline
from dvae import artefact, files
from dvae.drawings import Label, sheet
from dvae.errors import EnvironmentProblem, UserError, warn
from dvae.images import save


def sample(
    run: str,
    prompt: str | None = None,
    prompts: str | None = None,
    count: int = 16,
    keep: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    rerank: str | None = None,
    prune: bool = False,
    precision: str = "float32",
    seed: int = 0,
    exact: bool = False,
    out: str = "samples",
) -> None:
    """Draw pictures for a prompt and keep those that the model itself ranks best; nothing that exists is overwritten.

    Args:
        run: run folder or artefact folder of stage 2.
        prompt: what to draw.
        prompts: a text file with one prompt a line, instead of `prompt`.
        count: candidates per prompt.
        keep: how many of them are written, best first; null: four, or all where there are fewer.
        temperature: above 1 more varied, below 1 more careful.
        top_k: draw from the k most likely codes only.
        top_p: draw from the most likely codes that together have this probability.
        guidance: scale of classifier-free guidance; 1 is none.
        rerank: none, likelihood, pmi, half-pmi, contrast, caption, each but the first also as NAME-seen, or combined;
            null: combined where the model captions, half-pmi or likelihood elsewhere.
        prune: leave hopeless candidates behind on the way: best of 64 for less than the half of its work.
        precision: float32, bfloat16 or int8, each faster than the one before it and rougher: a seed's pictures are then
            others.
        seed: the same seed draws the same pictures.
        exact: bit-equal pictures whatever is drawn beside them; slower.
        out: folder for the pictures, a labelled grid and a JSON of how they were made.
    """
    keep = min(4, count) if keep is None else keep
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    wanted = read_prompts(prompt, prompts)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = EnvironmentProblem(f"{out} cannot be written: {error.strerror}", "choose another folder with --out")
        raise problem from error
    drawer = pipeline.load(run, precision)
    settings |= {"rerank": drawer.ranker if rerank is None else rerank, "prune": prune, "exact": exact}
    pipeline.warn_of_null(drawer, guidance, rerank)
    digest = artefact.digest(drawer.source)
    cells = drawer.model.config.grid[0] * drawer.model.config.grid[1]
    for text in wanted:
        drawer.check_words(text)
    for text in wanted:
        if strange := drawer.unread(text):
            warn(
                f"no caption of the training had {' '.join(sorted(strange))}, so this model cannot read them",
                f"say it like {drawer.captions[0]!r}",
            )
        if (length := int(drawer.text.lengths([text])[0])) > drawer.text.text_length:
            read = drawer.text.decode(drawer.text.encode(text))
            warn(
                f"the prompt has {length} ids, this model reads {drawer.text.text_length}: {read!r} is all that counts",
                "say it shorter; how long captions may be is chosen by dalle prepare --length",
            )
        with tqdm(total=count * cells, desc=text[:40], unit="token", leave=False, disable=None) as bar:
            pictures = drawer(text, count, keep, seed, progress=bar.update, **settings)
        stem = free_stem(folder, text, seed)
        names = [f"{stem}-{place}.png" for place in range(1, len(pictures) + 1)]
        for picture, name in zip(pictures, names, strict=True):
            save(picture.image, folder / name)
        labels = [Label(f"{place}: {picture.score:.2f}") for place, picture in enumerate(pictures, 1)]
        row = [(text, [picture.image for picture in pictures], labels)]
        save(sheet(row, side=max(96, pictures[0].image.shape[-1])), folder / f"{stem}.png")
        described = [
            {"file": name, "candidate": p.number, "score": p.score, "tokens": p.tokens.flatten().tolist()}
            for name, p in zip(names, pictures, strict=True)
        ]
        made = {"prompt": text, "seed": seed, "count": count, "keep": keep, **settings}
        made |= {"precision": drawer.precision, "artefact": digest}
        files.write_json(folder / f"{stem}.json", {**made, "pictures": described})
        print("wrote " + ", ".join(str(folder / name) for name in (f"{stem}.png", *names, f"{stem}.json")))


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
    """The one prompt, or the lines of a file that are not empty."""
    if (prompt is None) == (path is None):
        raise UserError("give either a prompt or --prompts FILE", 'for instance: dalle sample RUN "a red circle"')
    try:
        if prompt is not None:
            prompt.encode()  # the shell hands over any bytes
            return [prompt]
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}", "--prompts wants a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (character {error.start})", "type it as UTF-8") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} holds no prompt", "write one prompt a line")
    return found


def free_stem(folder: Path, text: str, seed: int) -> str:
    """A file name made of the prompt's letters, that nothing in `folder` begins with yet; it is taken at once."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60] or "prompt"
    for number in itertools.count(1):
        # not "-2": that is the name of the first call's second picture
        stem = f"{slug}-seed{seed}" + (f"-take{number}" if number > 1 else "")
        if any(folder.glob(f"{stem}[.-]*")):
            continue
        try:
            (folder / f"{stem}.json").touch(exist_ok=False)
            return stem
        except FileExistsError:  # another process was faster
            continue
    raise AssertionError("unreachable")
