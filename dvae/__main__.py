"""`dvae`: train, test and look at the image tokenizer."""

import sys
from collections.abc import Sequence

from dvae.commands import dispatch

HELP = """\
dvae: the discrete VAE, stage 1 of DALL-E

  dvae fit --config CONFIG [--run RUN] [--ckpt_path last]    train; --help lists every setting
  dvae validate --config CONFIG --ckpt_path best             losses and codebook use on the validation pictures
  dvae test --config CONFIG --ckpt_path best                 the same under the name of a test
  dvae reconstruct RUN IMAGES --out DIR                      pictures beside their reconstructions
  dvae codebook RUN DATA --out DIR                           usage, and what each code paints and stands for
  dvae evaluate RUN DATA --out DIR                           PSNR, SSIM, error per channel, the worst pictures
  dvae import openai ENCODER DECODER --out RUN               a run of the dVAE that OpenAI released, from its two files
  dvae import vqgan CHECKPOINT --out RUN                     a run of a VQGAN of taming-transformers, VQ or Gumbel

`dvae COMMAND --help` says more; --debug anywhere shows where an error arose.
exit codes: 0 done, 2 usage or config, 3 data, 4 artefact, 5 environment, 6 numerics, 130 and 143 stopped
"""

COMMANDS = {name: f"dvae.inspect:{name}" for name in ("reconstruct", "codebook", "evaluate")}
COMMANDS |= {f"import {release}": f"dvae.importers:{release}" for release in ("openai", "vqgan")}


def main(args: Sequence[str] | None = None) -> int:
    return dispatch("dvae", HELP, COMMANDS, "dvae.train:main", sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(main())
