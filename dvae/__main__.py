"""`dvae`: train, test and look at the image tokenizer. Each command opens its rooms when it is called."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt

from dvae.commands import dispatch

HELP = """\
dvae: the discrete VAE, stage 1 of DALL-E

  dvae fit --config CONFIG [--run RUN] [--ckpt_path last]    train; --help lists every setting
  dvae validate --config CONFIG --ckpt_path best             losses and codebook use on the validation pictures
  dvae test --config CONFIG --ckpt_path best                 the same under the name of a test
  dvae reconstruct RUN IMAGES --out DIR                      pictures beside their reconstructions
  dvae codebook RUN DATA --out DIR                           usage and an atlas of what each code paints

`dvae COMMAND --help` says more; --debug anywhere shows where an error arose.
exit codes: 0 done, 2 usage or config, 3 data, 4 artefact, 5 environment, 6 numerics, 130 and 143 stopped
"""


def fit(args: Sequence[str]) -> None:
    from dvae.train import main

    main(args)


def reconstruct(run: str, images: str, out: str = "out", count: PositiveInt = 32) -> None:
    """Encode pictures, decode them, and write a grid: originals above, reconstructions below.

    Args:
        run: a run folder or an artefact folder of stage 1.
        images: any data source: scenes:val, a folder, tars.
        out: folder to write reconstructions.png to.
        count: how many pictures.
    """
    import torch

    from dvae.data import check_share, open_source
    from dvae.images import grid, save, to_uint8
    from dvae.model import load

    model = load(run)
    source = open_source(images, model.config.image_size)
    check_share(source, max_bad=1)
    originals = source.images(range(min(count, len(source)))).float() / 255
    with torch.inference_mode():
        decoded = model.decode(model.encode(originals))
    both = torch.stack([originals, decoded], 1).flatten(0, 1)
    path = Path(out) / "reconstructions.png"
    save(grid(to_uint8(both), columns=8), path)
    psnr = (-10 * (decoded - originals).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean()
    print(f"PSNR {psnr:.2f} dB over {len(originals)} pictures; pairs of original and reconstruction\nwrote {path}")


def codebook(run: str, data: str, out: str = "out", count: PositiveInt = 2000) -> None:
    """Count the codes over a data source and draw what each one paints.

    Args:
        run: a run folder or an artefact folder of stage 1.
        data: any data source: scenes:val, a folder, tars.
        out: folder to write atlas.png, usage.png and codebook.json to.
        count: at most this many pictures are looked at.
    """
    from dvae.drawings import codebook_report

    for path in codebook_report(run, data, out, count):
        print(f"wrote {path}")


COMMANDS = {"reconstruct": reconstruct, "codebook": codebook}


def main(args: Sequence[str] | None = None) -> int:
    return dispatch("dvae", HELP, COMMANDS, fit, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(main())
