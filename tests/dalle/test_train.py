"""What stage 2 reads of its token files is a function of (seed, epoch, index)."""

import torch

from dalle.text import Text
from dalle.tokens import TokenFiles, TokenWriter
from dalle.train import Pairs


def test_a_crop_is_chosen_anew_in_each_epoch_and_the_same_in_any_batch(tmp_path):
    tokens = torch.randint(0, 1000, (6, 4, 2, 2))
    writer = TokenWriter(tmp_path, (2, 2), 1000, crops=4)
    writer.write(tokens, [[f"caption {index}"] for index in range(6)])
    writer.close()
    pairs = Pairs(TokenFiles(tmp_path), Text.train(["caption"], 300, 8), seed=3, bpe_dropout=0.0, caption_dropout=0.0)
    seen = {index: set() for index in range(6)}
    for epoch in range(30):
        rows = [(epoch, index) for index in range(6)]
        together = pairs.__getitems__(rows)["image_tokens"]
        assert torch.equal(together, torch.cat([pairs.__getitems__([row])["image_tokens"] for row in rows]))
        for index, picked in enumerate(together):
            (crop,) = [crop for crop in range(4) if torch.equal(tokens[index, crop], picked)]
            seen[index].add(crop)
    assert all(crops == {0, 1, 2, 3} for crops in seen.values())
