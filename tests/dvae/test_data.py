import io
import itertools
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dvae import data, images, scenes
from dvae.errors import DataError


def png(seed=0, height=10, width=12):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def accounted(source):
    assert len(source) + len(source.skipped) == source.listed
    assert len(set(source.keys)) == len(source.keys) == len(source)
    assert not set(source.keys) & {name for name, _ in source.skipped}
    for index in range(len(source)):
        image = source.image(index)
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert isinstance(source.captions(index), tuple)
    if len(source):
        batch = source.images(range(len(source)))
        assert batch.shape == (len(source), 3, source.size, source.size) and batch.dtype == torch.uint8
    return source


def rows(source):
    """What a source says, in a form that compares: key -> (pixels, captions)."""
    return {source.keys[n]: (source.image(n).numpy().tobytes(), source.captions(n)) for n in range(len(source))}


# ------------------------------------------------------------------------------------------------------ folders


def test_a_folder_with_good_and_bad_files(tmp_path):
    write(
        tmp_path,
        {
            "a.png": png(1),
            "a.txt": b"a red thing\n\n  the same thing \r\n",
            "deep/er/b.PNG": png(2),
            "deep/er/b.txt": b"\xef\xbb\xbfwith a mark of bytes",
            "alone.png": png(3),
            "blank.png": png(4),
            "blank.txt": b" \n\t\n",
            "cut.png": png(5)[:150],
            "empty.jpg": b"",
            "latin.png": png(6),
            "latin.txt": "une tache r\xe9elle".encode("latin-1"),
            "text.png": b"I am a text",
            "notes.md": b"not listed",
            "orphan.txt": b"a caption of nothing",
            ".hidden.png": png(7),
            ".git/c.png": png(8),
        },
    )
    source = accounted(data.open_source(str(tmp_path), size=8))
    captions = {source.keys[n]: source.captions(n) for n in range(len(source))}
    assert captions == {
        "a.png": ("a red thing", "the same thing"),
        "alone.png": (),
        "blank.png": (),
        "deep/er/b.PNG": ("with a mark of bytes",),
    }
    assert dict(source.skipped) == {
        "cut.png": "truncated",
        "empty.jpg": "empty file",
        "latin.png": "caption is not UTF-8 (byte 11)",
        "text.png": "not an image",
    }
    assert torch.equal(source.image(0), images.open_image(tmp_path / "a.png"))
    assert torch.equal(source.images([2, 0])[1], images.square(source.image(0), 8))


def test_equal_stems_are_different_rows(tmp_path):
    (tmp_path / "a.jpg").write_bytes(png(1))
    write(tmp_path, {"a.png": png(2), "a.txt": b"both", "x/a.png": png(3), "x/a.txt": b"other"})
    source = accounted(data.open_source(str(tmp_path), size=8))
    assert source.keys == ["a.jpg", "a.png", "x/a.png"]
    assert [source.captions(n) for n in range(3)] == [("both",), ("both",), ("other",)]


def test_links_pipes_and_folders_named_like_pictures(tmp_path):
    root = tmp_path / "root"
    write(root, {"good.png": png(1), "sub/inner.png": png(2), "folder.jpg/x.png": png(3), "a.png": png(4)})
    write(tmp_path, {"outside.png": png(5), "outside/o.png": png(6), "secret.txt": b"secret"})
    os.mkfifo(root / "pipe.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "in.png").symlink_to("sub/inner.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "round").symlink_to(root)
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    source = accounted(data.open_source(str(root), size=8))
    assert source.keys == ["good.png", "in.png", "sub/inner.png"]
    skipped = dict(source.skipped)
    assert skipped["pipe.png"] == "not a regular file"
    assert skipped["folder.jpg"] == "a folder"
    assert skipped["out.png"] == "a link that leads out of the folder"
    assert skipped["a.png"] == "caption: a link that leads out of the folder"
    assert skipped["linked"] == skipped["round"] == "a linked folder is not entered"
    assert skipped["broken.png"].startswith("cannot be read")
    assert skipped["loop.png"].startswith("cannot be read")
    assert len(skipped) == 8


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    write(tmp_path, {f"{name}.png": png(n) for n, name in enumerate(["b", "a/z", "c", "a/b", "B", "d/e/f"])})
    first = data.open_source(str(tmp_path), size=8).keys
    listing = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda path: reversed(sorted(listing(path))))
    assert data.open_source(str(tmp_path), size=8).keys == first == sorted(first)


def test_a_picture_that_disappears_is_named(tmp_path):
    write(tmp_path, {"a.png": png(1)})
    source = data.open_source(str(tmp_path), size=8)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="a.png: empty file"):
        source.images([0])


def test_caps_on_sizes(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": png(1), "a.txt": b"x" * 100, "b.png": png(2)})
    monkeypatch.setattr(data, "_LARGEST_CAPTION", 99)
    assert data.open_source(str(tmp_path), size=8).skipped == [("a.png", "caption: too large: 100 bytes")]
    monkeypatch.setattr(data, "_LARGEST_PICTURE", 99)
    assert len(data.open_source(str(tmp_path), size=8)) == 0


# ------------------------------------------------------------------------------------------------------ shards


FILES = {
    "a.png": png(1),
    "a.txt": b"first\nagain",
    "b.x.jpg": b"another field of sample b",
    "b.png": png(2),
    "b.txt": b"second",
    "sub.dir/c.PNG": png(3),
    "sub.dir/c.txt": b"third",
    "d.txt": b"before its picture",
    "d.png": png(4),
    "e.png": png(5)[:100],
    "readme.md": b"ignored",
}


def test_a_tar_reads_as_its_files(tmp_path):
    folder = tmp_path / "folder"
    write(folder, {name: content for name, content in FILES.items() if name != "b.x.jpg"})
    tar(tmp_path / "shard.tar", FILES)
    before = sorted(os.listdir(tmp_path))
    packed = accounted(data.open_source(str(tmp_path / "shard.tar"), size=8))
    plain = accounted(data.open_source(str(folder), size=8))
    assert rows(packed) == {f"shard.tar/{key}": row for key, row in rows(plain).items()}
    assert packed.skipped == [("shard.tar/e.png", "truncated")] and packed.listed == plain.listed == 5
    assert sorted(os.listdir(tmp_path)) == before  # nothing was extracted


def test_several_shards(tmp_path):
    for n in range(3):
        tar(tmp_path / f"s-{n:03d}.tar", {f"{name}.png": png(10 * n + k) for k, name in enumerate("ab")})
    keys = [f"s-{n:03d}.tar/{name}.png" for n in range(3) for name in "ab"]
    for pattern in ("s-{000..002}.tar", "s-*.tar", "s-{000,001,002}.tar", "{s-000,s-001,s-002}.tar", "s-00{0..2}.tar"):
        assert accounted(data.open_source(str(tmp_path / pattern), size=8)).keys == keys, pattern
    assert data.open_source(str(tmp_path), size=8).keys == keys  # a folder of nothing but shards
    assert data.open_source(str(tmp_path / "s-{001..002}.tar"), size=8).keys == keys[2:]
    with pytest.raises(DataError, match=r"no such data source: .*s-003\.tar"):
        data.open_source(str(tmp_path / "s-{000..003}.tar"), size=8)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "s-000.tar", tmp_path / "other")
    both = accounted(data.open_source(str(tmp_path / "{s-000,other/s-000}.tar"), size=8))
    assert both.keys == ["s-000.tar/a.png", "s-000.tar/b.png", "other/s-000.tar/a.png", "other/s-000.tar/b.png"]


def test_hostile_members(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in [
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder.png", tarfile.DIRTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../up.png", "/absolute.png", "twice.png", "twice.png", "linked.png"):
            member = tarfile.TarInfo(name)
            content = png(len(name))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("linked.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    source = accounted(data.open_source(str(tmp_path / "s.tar"), size=8))
    assert source.keys == [
        "s.tar/../up.png",
        "s.tar//absolute.png",
        "s.tar/twice.png",
    ]  # names only: nothing is written
    assert [reason for _, reason in source.skipped] == ["not a regular member"] * 5 + [
        "a second member of this name",
        "caption: not a regular member",
    ]
    assert os.listdir(tmp_path) == ["s.tar"]


def test_a_cut_tar_gives_what_is_whole(tmp_path):
    files = {f"{n:02d}.{kind}": png(n) if kind == "png" else b"words" for n in range(6) for kind in ("png", "txt")}
    tar(tmp_path / "whole.tar", files)
    content = (tmp_path / "whole.tar").read_bytes()
    whole = data.open_source(str(tmp_path / "whole.tar"), size=8)
    assert not whole.skipped
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive}
        last = archive.offset
    for length in itertools.chain(range(0, len(content), 97), [*ends.values(), *(end - 1 for end in ends.values())]):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        source = accounted(data.open_source(str(tmp_path / "cut.tar"), size=8))
        kept = [f"cut.tar/{name}" for name, end in ends.items() if end <= length and name.endswith("png")]
        assert source.keys == kept, length
        faults = [name for name, _ in source.skipped]
        assert faults == ([] if length >= last + 512 else ["cut.tar"]), length


def test_a_damaged_header_is_listed(tmp_path):
    files = {f"{n}.png": png(n) for n in range(4)}
    tar(tmp_path / "s.tar", files)
    with tarfile.open(tmp_path / "s.tar") as archive:
        third = archive.getmembers()[2].offset
    content = bytearray((tmp_path / "s.tar").read_bytes())
    content[third + 10] ^= 1
    (tmp_path / "s.tar").write_bytes(content)
    source = accounted(data.open_source(str(tmp_path / "s.tar"), size=8))
    assert source.keys == ["s.tar/0.png", "s.tar/1.png"]
    assert source.skipped == [("s.tar", f"truncated or damaged at byte {third}")]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b\x08\0" + bytes(600)])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    source = accounted(data.open_source(str(tmp_path / "s.tar"), size=8))
    assert [name for name, _ in source.skipped] == ["s.tar"]
    with pytest.raises(DataError, match="0 usable of 1"):
        data.check_share(source)


def test_a_header_that_lies_about_its_size(tmp_path):
    member = tarfile.TarInfo("huge.png")
    member.size = 10 << 30
    (tmp_path / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    source = accounted(data.open_source(str(tmp_path / "s.tar"), size=8))
    assert source.skipped == [("s.tar", "truncated at byte 2560")]


# ------------------------------------------------------------------------------------------------------ scenes


def test_scenes():
    source = accounted(data.open_source("scenes:val:40", size=16, seed=3))
    assert (len(source), source.listed, source.skipped) == (40, 40, [])
    numbers = [7, 0, 39, 7]
    drawn = scenes.draw([scenes.scene("val", n, seed=3) for n in numbers], 16)
    assert torch.equal(source.images(numbers), drawn)
    assert torch.equal(source.image(39), drawn[2])
    assert source.captions(7) == scenes.captions("val", 7, seed=3)
    other = data.open_source("scenes:val:40", size=16, seed=4)
    assert not torch.equal(source.images(range(40)), other.images(range(40)))


def test_scenes_are_drawn_once(monkeypatch):
    drawn = []
    draw = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda rows, size: (drawn.append(len(rows)), draw(rows, size))[1])
    source = data.open_source("scenes:train:300", size=8)
    assert drawn == []
    source.images([299]), source.images(range(300)), source.image(5)
    assert sum(drawn) == 300


def test_scenes_by_name():
    assert [
        len(data.open_source(name, size=8)) for name in ("scenes", "scenes:train", "scenes:val", "scenes:heldout")
    ] == [
        20_000,
        20_000,
        2_000,
        2_000,
    ]
    for name in ("scenes:", "scenes:test", "scenes:train:", "scenes:train:x", "scenes:train:-1", "scenes:train:5:6"):
        with pytest.raises(DataError, match="no such scenes"):
            data.open_source(name, size=8)


# ------------------------------------------------------------------------------------------------------ refusing


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name, what in [("nowhere", "no such data source"), ("a.parquet", "is no data source"), ("x-*.tar", "no such")]:
        with pytest.raises(DataError, match=what) as caught:
            data.open_source(str(tmp_path / name), size=8)
        assert caught.value.code == 3 and "scenes" in caught.value.hint and ".tar" in caught.value.hint


def test_check_share(tmp_path):
    write(tmp_path, {f"{n:03d}.png": png(n) for n in range(97)} | {f"bad{n}.png": png(n)[:90] for n in range(3)})
    source = data.open_source(str(tmp_path), size=8)
    data.check_share(source, max_bad=0.03)
    with pytest.raises(DataError, match=r"3 of 100 files cannot be used, e\.g\. bad0\.png: truncated"):
        data.check_share(source)
    with pytest.raises(DataError, match="3 of 100"):
        data.check_share(source, max_bad=0.029)


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match="0 usable of 0"):
        data.check_share(data.open_source(str(tmp_path), size=8), max_bad=1.0)
    write(tmp_path, {"a.png": b""})
    with pytest.raises(DataError, match=r"0 usable of 1 listed, e\.g\. a\.png: empty file"):
        data.check_share(data.open_source(str(tmp_path), size=8), max_bad=1.0)


# ------------------------------------------------------------------------------------------------------ splitting


@pytest.fixture
def twenty(tmp_path):
    write(tmp_path, {f"{n:02d}.png": png(n) for n in range(20)} | {"bad.png": b"", "03.txt": b"three"})
    return data.open_source(str(tmp_path), size=8)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.99, 1.0])
def test_split_shares_out_every_row(twenty, share):
    parts = data.split(twenty, share)
    training, validation = map(accounted, parts)
    assert len(training) and len(validation)
    assert rows(training) | rows(validation) == rows(twenty)
    assert len(training) + len(validation) == 20
    assert training.listed + validation.listed == twenty.listed
    assert [part.keys for part in data.split(twenty, share)] == [part.keys for part in parts]


def test_split_has_the_share_and_is_random():
    source = data.open_source("scenes:train:4000", size=8)
    training, validation = data.split(source, 0.1)
    assert abs(len(validation) - 400) < 80  # 4 standard deviations
    places = [source.keys.index(key) for key in validation.keys]
    assert abs(np.mean(places) - 2000) < 250


def test_a_row_stays_on_its_side_when_others_come():
    small, large = (data.open_source(f"scenes:train:{count}", size=8) for count in (500, 1500))
    assert set(data.split(small, 0.2)[1].keys) <= set(data.split(large, 0.2)[1].keys)


def test_split_needs_two_rows():
    with pytest.raises(DataError, match="cannot be split"):
        data.split(data.open_source("scenes:train:1", size=8), 0.5)
    assert [len(part) for part in data.split(data.open_source("scenes:train:2", size=8), 0.5)] == [1, 1]


# ------------------------------------------------------------------------------------------------------ order


def taken(sampler, batches):
    return list(itertools.islice(iter(sampler), batches))


def test_order_is_a_permutation_and_a_function():
    first = data.order(0, 0, 1000)
    assert first.dtype == np.int64 and sorted(first) == list(range(1000))
    assert np.array_equal(first, data.order(0, 0, 1000))
    others = [data.order(0, 1, 1000), data.order(1, 0, 1000), np.arange(1000)]
    assert all((first == other).mean() < 0.01 for other in others)
    assert data.order(5, 2, 6).tolist() == [0, 3, 1, 4, 5, 2]


@pytest.mark.parametrize("length, batch", [(10, 3), (10, 5), (7, 16), (1, 4), (12, 1)])
def test_each_row_comes_once_per_epoch_without_gap(length, batch):
    pairs = list(itertools.chain(*taken(data.Endless(length, batch, seed=2), 5 * length)))
    for epoch in range(5):
        own = pairs[epoch * length : (epoch + 1) * length]
        assert own == [(epoch, index) for index in data.order(2, epoch, length)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_start_is_a_resume(world):
    for rank in range(world):
        whole = taken(data.Endless(11, 4, seed=5, rank=rank, world=world), 40)
        for start in range(25):
            rest = taken(data.Endless(11, 4, seed=5, start=start, rank=rank, world=world), 40 - start)
            assert rest == whole[start:]


@pytest.mark.parametrize("length, batch, world", [(10, 3, 2), (7, 4, 3), (5, 8, 4)])
def test_ranks_share_one_stream(length, batch, world):
    count = 6
    alone = list(itertools.chain(*taken(data.Endless(length, batch * world, seed=1), count)))
    ranks = [taken(data.Endless(length, batch, seed=1, rank=rank, world=world), count) for rank in range(world)]
    flat = [list(itertools.chain(*batches)) for batches in ranks]
    assert [flat[n % world][n // world] for n in range(len(alone))] == alone
    assert sum(map(len, flat)) == len(alone)
    for b in range(count):  # at each batch all ranks together have what one rank with the whole batch has
        together = set(itertools.chain(*(batches[b] for batches in ranks)))
        assert together == set(alone[b * batch * world : (b + 1) * batch * world])


def test_a_loader_takes_it():
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, pair):
            return pair

    sampler = data.Endless(5, 3, seed=0)
    with pytest.raises(TypeError):
        len(sampler)
    loader = torch.utils.data.DataLoader(Rows(), batch_sampler=sampler, collate_fn=list)
    assert list(itertools.islice(iter(loader), 9)) == taken(sampler, 9)


# ------------------------------------------------------------------------------------------------------ real data


def test_real_data(real_data):
    source = data.open_source(real_data, size=32)
    data.check_share(source)
    assert len(source) + len(source.skipped) == source.listed > 0
    few = range(0, len(source), max(1, len(source) // 50))
    assert source.images(few).shape == (len(few), 3, 32, 32)
    assert all(source.captions(n) for n in few)
    training, validation = data.split(source, 0.05)
    assert len(training) + len(validation) == len(source) and len(validation) > 0
