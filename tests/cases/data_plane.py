"""What people's folders, archives and shards hold, against prepare, verify, inspect, the loaders and training.

Every input is small and made here, after kinds of reports that users of data loaders file. Of each a user expects:
understood; or refused with exit code 2 and one line that names the culprit; or skipped and listed. Never a traceback, a
hang, a sample lost silently, or pixels that depend on the decoder. Run by tests/test_cases_data_plane.py.
"""

import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases.harness import (
    SIDE,
    Verdict,
    decode,
    distance,
    encode,
    folders,
    layout,
    pack,
    photo,
    prepared,
    run,
    samples,
    train,
    tree,
    truth_of,
    which,
)
from PIL import Image, PngImagePlugin


def odd_exif(tmp: Path) -> Verdict:
    """A photo with Orientation 6 and ResolutionUnit as a LONG of 70000: turned upright, or listed."""
    wide, entries = photo(30, (64, 48)), struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, 6, 0x0128, 4, 1, 70000)
    made = prepared(tmp, {"dog/odd.jpg": encode(wide, exif=b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4))})
    upright = wide.transpose(Image.Transpose.ROTATE_270).resize((128, 128), Image.Resampling.LANCZOS)
    if "dog/odd.jpg" not in made.images:
        return made.mentions("dog/odd.jpg"), "skipped"
    apart = distance(made.images["dog/odd.jpg"], upright)
    return apart < 8, f"{apart:.1f} grey levels from upright"


def truncated_test_image(tmp: Path, backend: str) -> Verdict:
    """Evaluation meets half a JPEG in others' shard: one line that names shard and sample, exit code 2."""
    pack(tmp / "in" / "train-0.tar", samples())
    pack(tmp / "in" / "test-0.tar", samples(prefix="t", s3=encode(photo(3))[:900]))
    done = train(tmp / "in", f"data.backend={backend}", "metric.trials=0")
    named = [line for line in done.err.splitlines() if "test-0.tar" in line and re.search(r"\bt3\b|\bsample 3\b", line)]
    return done.code == 2 and len(named) == 1 and "Traceback" not in done.err, f"exit {done.code}: {done.line}"


def large_profile(tmp: Path) -> Verdict:
    """500 kB of ICC profile before the frame header, in others' shard: the index has the size, both backends see it."""
    profile = np.random.default_rng(0).bytes(500_000)
    pack(tmp / "in" / "train-0.tar", samples(s3=encode(photo(3), icc_profile=profile)))
    sides = decode(tmp / "in", "index").seen["sides"][3].tolist()
    good, text = sides == [SIDE, SIDE], f"in the index {sides}"
    for backend in ("dali", "torch"):
        done = decode(tmp / "in", backend, "random_resized_crop")
        right = not done.code and which(done.seen["images"][3], [3]) == 3
        colours = 0 if done.code else len(np.unique(done.seen["random_resized_crop"][3].reshape(3, -1), axis=1).T)
        good = good and right and colours > 100
        text += f"; {backend}: whole {'right' if right else done.line[:40] or 'wrong'}, {colours} colours in the crop"
    return good, text


def stray_byte(tmp: Path) -> Verdict:
    """A zero byte between two segments of a JPEG, size=0: what prepare keeps, verify passes, both backends decode."""
    jpeg, out = encode(photo(30)), tmp / "out"
    made = prepared(tmp, {"dog/odd.jpg": jpeg[:20] + b"\0" + jpeg[20:]}, "size=0")  # after APP0
    good, text = len(made.images) == 7 or made.mentions("dog/odd.jpg"), f"{len(made.images)} of 7 kept"
    commands = {"verify": run("pipelines.verify", out), "dali": decode(out, "dali"), "torch": decode(out, "torch")}
    for name, done in commands.items():
        photos = [which(image, (0, 1, 2, 10, 11, 12, 30)) for image in done.seen.get("images", ())]
        right = not done.code and None not in photos
        good = good and right
        problem = (done.line or done.out)[-80:] if done.code else "sees another picture"
        text += f"; {name} {'passes' if right else problem}"
    return good, text


def plain_cmyk(tmp: Path) -> Verdict:
    """A CMYK JPEG without Adobe's marker in others' shard: one picture for both backends, or refused when indexed."""
    jpeg = encode(photo(3).convert("CMYK"))
    at = jpeg.index(b"\xff\xee")
    end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    pack(tmp / "in" / "train-0.tar", samples(s3=jpeg[:at] + jpeg[end:]))
    index, dali, torch = (decode(tmp / "in", backend) for backend in ("index", "dali", "torch"))
    if index.code or dali.code or torch.code:
        return index.refuses("train-0.tar"), f"index: {index.line}; dali: {dali.line}; torch: {torch.line}"
    apart = [distance(a, b) for a, b in zip(dali.seen["images"], torch.seen["images"], strict=True)]
    good = max(apart) < 8
    return good, f"{apart.pop(3):.0f} grey levels between dali and torch; of the other photos {max(apart):.1f} at most"


def one_rule(tmp: Path, files: dict[str, bytes]) -> Verdict:
    """Index and stream of others' shard group its members alike: the same photos, or all refuse."""
    pack(tmp / "in" / "train-0.tar", files)
    views: list[Any] = []
    text = []
    for backend in ("dali", "torch", "webdataset"):
        done = decode(tmp / "in", backend)
        seen = {which(image, range(12)) for image in done.seen.get("images", [photo(99)])}
        views.append("refused" if done.refuses("train-0.tar") else None if None in seen else sorted(seen))
        text.append(f"{backend}: {done.line[:60] or ('other pictures' if None in seen else f'{len(seen)} samples')}")
    return views[0] is not None and views.count(views[0]) == 3, "; ".join(text)


def tiny_imagenet(tmp: Path) -> Verdict:
    """train/WNID/images/*, val/images/* with val_annotations.txt, test/images/* without labels."""
    wnids = ("n01443537", "n01629819", "n01641577")
    truth = {f"train/{wnid}/images/{wnid}_{k}.JPEG": f"train/{wnid}" for wnid in wnids for k in range(3)}
    truth |= {f"val/images/val_{k}.JPEG": f"test/{wnids[k % 3]}" for k in range(6)}
    truth |= {f"test/images/test_{k}.JPEG": "" for k in range(6)}
    files = {name: encode(photo(k)) for k, name in enumerate(truth)}
    files["val/val_annotations.txt"] = "".join(
        f"val_{k}.JPEG\t{wnids[k % 3]}\t0\t0\t62\t62\n" for k in range(6)
    ).encode()
    files |= {"wnids.txt": "\n".join(wnids).encode(), "words.txt": b"n01443537\tgoldfish\n"}
    return layout(tree(tmp / "in", files), truth, "val", "test")


def unlabelled(tmp: Path, labelled: dict[str, bytes], others: Iterable[str], *words: str, **more: Any) -> Verdict:
    """Labelled photos beside others that have no label: none of these becomes a sample or a class."""
    files = {**labelled, **{name: encode(photo(40 + k)) for k, name in enumerate(others)}}
    return layout(tree(tmp / "in", files), {**truth_of(labelled), **dict.fromkeys(others, "")}, *words, **more)


def dest_in_source(tmp: Path) -> Verdict:
    """prepare photos photos/prepared, ended by strict=true, again without: the same photos; or refused at once."""
    source, dest = tree(tmp / "in", {**folders(8), "dog/bad.jpg": b"no image"}), tmp / "in" / "prepared"
    first = run("pipelines.prepare", source, dest, "shard_size=2", "strict=true")
    if not dest.with_name("prepared.partial").exists():
        return first.refuses("prepared"), first.line
    return layout(source, {**truth_of(folders(8)), "dog/bad.jpg": ""}, dest=dest, options=["shard_size=2"])


def joined(tmp: Path, *tars: dict[str, Any]) -> bytes:
    return b"".join(pack(tmp / "one", files).read_bytes() for files in tars)


def joined_tars(tmp: Path) -> Verdict:
    """cat a.tar b.tar > in.tar: the photos of both, or refused."""
    halves = ({name: data for name, data in folders().items() if name[:3] == half} for half in ("cat", "dog"))
    return layout(tree(tmp, {"in.tar": joined(tmp, *halves)}) / "in.tar", truth_of(folders()), "in.tar")


def links_in_a_tar(tmp: Path) -> Verdict:
    """Hard and symbolic links to images of the same tar are images, or listed."""
    links = {f"cat/{k}.jpg": (tarfile.SYMTYPE, "0.jpg") for k in (3, 4, 5)}
    links |= {f"dog/{k}.jpg": (tarfile.LNKTYPE, "dog/0.jpg") for k in (3, 4, 5)}
    return layout(pack(tmp / "in.tar", {**folders(6), **links}), truth_of(folders(6)), "link")


def whole_shard(tmp: Path, tars: Iterable[dict[str, Any]], count: int, *words: str) -> Verdict:
    """Others' shard with links, or two joined: all samples in the index, or a line that names what is not."""
    done = decode(tree(tmp / "in", {"train-0.tar": joined(tmp, *tars)}), "index")
    found = len(done.seen.get("labels", ()))
    complete = not done.code and (found == count or any(word in done.err for word in words))
    return done.refuses(*words) or complete, f"{found} of {count} samples {done.line}"


def two_symlink_loops(tmp: Path) -> Verdict:
    """cat/up and dog/up lead to the folder above: it ends, and has each photo once."""
    source = tree(tmp / "in", folders())
    for name in ("cat", "dog"):
        (source / name / "up").symlink_to("..")
    good, text = layout(source, truth_of(folders()), "/up", memory=4 << 30, seconds=12)
    return good and "/up/" not in text, text  # a refusal has seen the loop, and was not caught in it


def huge_label(tmp: Path) -> Verdict:
    """A .cls of 2000000000 in others' shard, in 2 GB of memory: refused with the label."""
    ends = []
    for label in ("2000000000", "3"):
        shard = pack(tmp / f"{len(label)}" / "train-0.tar", {**samples(), "3.cls": label.encode()})
        ends.append(decode(shard.parent, "index", memory=2 << 30, OPENBLAS_NUM_THREADS="1"))
    done, control = ends
    good = not control.code and done.refuses("2000000000")
    return good, f"exit {done.code}: {done.line or 'taken'} (a label of 3: exit {control.code})"


def ascii_prepare(tmp: Path) -> Verdict:
    """PYTHONIOENCODING=ascii, a class café, DEST données: prepared, inspected and verified."""
    source = tree(tmp / "in", {name.replace("cat", "café"): data for name, data in folders().items()})
    dest = tmp / "données"
    commands = {"prepare": (source, dest), "inspect": (dest,), "verify": (dest,)}
    ends = {name: run(f"pipelines.{name}", *paths, PYTHONIOENCODING="ascii") for name, paths in commands.items()}
    text = "; ".join(f"{name}: exit {done.code} {done.line[:60]}" for name, done in ends.items())
    return not any(done.code for done in ends.values()), text


def terminal(tmp: Path, train_encoding: str | None = None, measure_encoding: str | None = None) -> Verdict:
    """With that PYTHONIOENCODING: trained to the end with the metric, the last checkpoint is there; then measured."""
    pack(tmp / "in" / "train-0.tar", samples(12))
    pack(tmp / "in" / "test-0.tar", samples(4, 20))
    metric = ("trials=2", "samples=4", "images=8")
    settings = (
        [f"metric.{setting}" for setting in (*metric, "every_epochs=1")] if train_encoding else ["metric.trials=0"]
    )
    done = train(tmp / "in", *settings, PYTHONIOENCODING=train_encoding or "utf-8")
    last = any((tmp / "run" / "checkpoints").glob("step-00000003*"))
    if measure_encoding and last:
        settings = [*metric, "threads=1", f"output={tmp}/m"]
        done = run("infomcr_dist.measure", tmp / "run", *settings, PYTHONIOENCODING=measure_encoding)
    text = f"exit {done.code}, {'with' if last else 'without'} the last checkpoint"
    return done.code == 0 and last, text + f": {done.line}" * bool(done.code)


def texts_in_images(tmp: Path) -> Verdict:
    """3 MB of text do not keep a PNG out; texts of PNGs and comments of JPEGs do not reach the shards."""
    note, large, small = "taken by nobody", PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    large.add_text("comment", note + "0" * 3_000_000, zip=True)
    small.add_text("comment", note)
    files = {f"cat/{name}.png": encode(photo(30), "PNG", pnginfo=text) for name, text in (("l", large), ("s", small))}
    made = prepared(tmp, {**files, "dog/note.jpg": encode(photo(31), comment=note.encode())})
    skipped, found = (
        files.keys() - made.images.keys(),
        [k for k, image in made.images.items() if note.encode() in image],
    )
    text = f"skipped: {', '.join(skipped) or 'none'}; with the comment: {', '.join(found) or 'none'}"
    return len(made.images) == 9 and not found, text


def sixteen_bits(tmp: Path) -> Verdict:
    """16-bit grey PNGs of one scene, exposed 1, 5 and 100 times as long: 5 and 100 times as bright."""
    scene = np.asarray(photo(30).convert("L"), np.uint16) * 250 // 255
    files = {f"grey/{times}.png": encode(Image.fromarray(scene * np.uint16(times)), "PNG") for times in (1, 5, 100)}
    made = prepared(tmp, files)
    one, five, hundred = (float(np.asarray(Image.open(io.BytesIO(made.images[name]))).mean()) for name in files)
    good = abs(five - 5 * one) < 4 and abs(hundred - 20 * five) < 14 and hundred > 20
    return good, f"means {one:.1f}, {five:.1f}, {hundred:.1f} of 255"


def swapped_labels(tmp: Path) -> Verdict:
    """Others' shard rewritten with other labels, size and time of change as before: the new labels, or refused."""
    shard = pack(tmp / "in" / "train-0.tar", samples())
    stat, before = shard.stat(), decode(tmp / "in", "index").seen["labels"]
    pack(shard, {name: data if name[-3:] == "jpg" else b"%d" % (data == b"0") for name, data in samples().items()})
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = decode(tmp / "in", "index")
    same_size = shard.stat().st_size == stat.st_size
    new = not after.code and same_size and list(after.seen["labels"]) == [1 - label for label in before]
    return new or after.refuses("train-0.tar"), after.line or f"labels {before} became {after.seen['labels']}"


MASKED = dict(item for k in range(12) for item in {**samples(1, k), f"{k}.mask.jpg": encode(photo(99))}.items())
LINKED = {**samples(), **{f"{k}.jpg": (tarfile.LNKTYPE, f"{k - 3}.jpg") for k in (3, 4, 5)}}
TRAIN, FLAT_VAL = folders(under="train/"), [f"val/ILSVRC2012_val_0000000{k}.jpg" for k in range(4)]
CASES: dict[str, Callable[[Path], Verdict]] = {
    "odd exif": odd_exif,
    "truncated test image, dali": partial(truncated_test_image, backend="dali"),
    "truncated test image, torch": partial(truncated_test_image, backend="torch"),
    "large profile": large_profile,
    "stray byte": stray_byte,
    "plain cmyk": plain_cmyk,
    "several images a key": partial(one_rule, files=MASKED),
    "dotted keys": partial(one_rule, files=samples(12, prefix="img.")),
    "tiny imagenet": tiny_imagenet,
    # valid/CLASS/*: the test split, or named as what was not understood; val/* without labels: refused, or listed
    "valid beside train": lambda tmp: unlabelled(tmp, {**TRAIN, **folders(under="valid/")}, (), "valid"),
    "flat val": lambda tmp: unlabelled(tmp, TRAIN, FLAT_VAL, "val"),
    # Neither classes nor samples; they need not be listed.
    "@eaDir": lambda tmp: unlabelled(
        tmp, folders(), ["cat/@eaDir/0.jpg/THUMB.jpg", "@eaDir/x.jpg"], "@eaDir", silent=["@eaDir"]
    ),
    "#recycle": lambda tmp: unlabelled(tmp, folders(), ["#recycle/old.jpg"], "#recycle", silent=["#recycle"]),
    "dest in source": dest_in_source,
    "joined tars": joined_tars,
    "links in a tar": links_in_a_tar,
    "links in a shard": lambda tmp: whole_shard(tmp, [LINKED], 6, "train-0.tar: 3", "3.jpg"),
    "joined shards": lambda tmp: whole_shard(tmp, [samples(), samples(start=6)], 12, "train-0.tar"),
    "two symlink loops": two_symlink_loops,
    "huge label": huge_label,
    "ascii prepare": ascii_prepare,
    "ascii train": partial(terminal, train_encoding="ascii"),
    "ascii measure": partial(terminal, measure_encoding="ascii"),
    "utf-8 train and measure": partial(terminal, train_encoding="utf-8", measure_encoding="utf-8"),
    "texts in images": texts_in_images,
    "sixteen bits": sixteen_bits,
    "swapped labels": swapped_labels,
}
