"""Tests of emotion_recognition.py. They make their own small corpus and need no network.

    pip install -r requirements.txt pytest hypothesis jupytext nbclient ipykernel
    python -m pytest                              everything but the speed measurements
    python -m pytest -m benchmark -s              the speed measurements
    RAVDESS_PATH=folder python -m pytest -k real  what the real corpus must look like

The demo on six actors, one epoch per model, runs once (fixture `finished`); tests read it or work on a copy.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import filelock
import jupytext
import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import emotion_recognition as er

SCRIPT, START = Path(er.__file__), Path.cwd()
REAL = os.environ.get("RAVDESS_PATH", "")
TINY = "--device cpu --epochs-cnn 1 --epochs-rnn 1 --epochs-bert 1 --epochs-fusion 1".split()
DEMO = ["--demo", *TINY, "--fusion", "both"]
CORPUS, ENCODER, OUTPUT = Path("archive/demo/corpus"), Path("archive/demo/distilbert"), Path("outputs/demo")
SIX_ACTORS = functools.partial(er.write_demo_corpus, actors=range(1, 7))
ALONE = [name for name in er.ROWS if name.endswith(("_audio", "_text"))]
STEMS = {name: row.stem for name, row in er.ROWS.items()
         if "views" not in name and "ensemble" not in name and name not in ALONE}
READS_TEXT = [name for name in er.MODELS if name != "cnn"]
RATE = 16000


def config(**changes):
    """The default settings on the CPU, with changes."""
    return SimpleNamespace(**vars(er.parse_settings([])) | {"device": "cpu"} | changes)


def touch(folder, *names):
    """Write files that differ from each other; only their names matter."""
    for path in (Path(folder, name) for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(path))


def contents(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run_script(*argv):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which the demo has run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(er, "write_demo_corpus", SIX_ACTORS)
        er.main(DEMO)
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test works in its own folder, sees no corpus of this machine, and makes small demos only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr(er, "write_demo_corpus", SIX_ACTORS)


@pytest.fixture
def copied(finished, tmp_path):
    """The current folder holds a copy of the finished demo."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def trained(monkeypatch):
    """The names of the models that are trained from here on."""
    names, train = [], er.train_model
    monkeypatch.setattr(er, "train_model", lambda name, *rest: (names.append(name), train(name, *rest)))
    return names


@pytest.fixture(scope="session")
def demo(finished):
    """(settings, clips) of the finished demo, with absolute paths."""
    cfg = er.parse_settings(DEMO)
    cfg.output_dir = cfg.cache_dir = str(finished / OUTPUT)
    cfg.bert_model = str(finished / ENCODER)
    clips, audit = er.index_clips(finished / CORPUS)
    clips = er.split_clips(er.add_features(clips, audit, cfg), cfg)
    return cfg, er.add_transcripts(clips, cfg, "cpu")


@pytest.fixture(scope="session")
def all_names(tmp_path_factory):
    """(clips, audit) of 1440 tiny files under the names of the corpus, two of them with the same bytes."""
    folder = tmp_path_factory.mktemp("names")
    codes = itertools.product(range(1, 9), (1, 2), (1, 2), (1, 2), range(1, 25))
    touch(folder, *(f"Actor_{a:02}/03-01-{e:02}-{i:02}-{s:02}-{r:02}-{a:02}.wav"
                    for e, i, s, r, a in codes if (e, i) != (1, 2)))
    for repetition in (1, 2):
        (folder / f"Actor_07/03-01-03-01-02-0{repetition}-07.wav").write_bytes(b"same")
    return er.index_clips(folder)


def batch_of(model, clips, cfg, augment=False):
    return er.ClipDataset(clips, model, cfg, "cpu", augment)[list(range(len(clips)))]


# %% The corpus
SAME_BYTES = "Same bytes under two names, both kept: 03-01-03-01-02-01-07 = 03-01-03-01-02-02-07."
PER_EMOTION = f"Clips per emotion: neutral 96, {', '.join(f'{name} 192' for name in er.EMOTIONS[1:])}."


def test_labels_come_from_the_name_in_code_order():
    touch("corpus", *(f"03-01-{code:02}-01-01-02-{10 + code}.wav" for code in range(1, 9)))
    clips, _ = er.index_clips("corpus")
    names = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
    assert list(clips["emotion"]) == er.EMOTIONS == names
    assert list(clips["actor"]) == list(range(11, 19)) and list(clips["sex"][:2]) == ["male", "female"]
    assert set(zip(clips["intensity"], clips["statement"], clips["repetition"], strict=True)) == {(1, 1, 2)}


def test_label_encoder_keeps_the_code_order(finished):
    encoder = pickle.loads((finished / OUTPUT / "label_encoder.pkl").read_bytes())
    assert list(encoder.inverse_transform(range(8))) == er.EMOTIONS


def test_a_name_that_occurs_twice_counts_once():
    for folder in ("", "deep/down/Actor_12/"):
        touch("corpus", f"{folder}03-01-05-01-02-01-12.wav", f"{folder}03-01-06-01-02-01-12.wav")
    clips, audit = er.index_clips("corpus")
    assert len(clips) == 2 and audit["twins"] == 2


def test_a_damaged_first_copy_does_not_hide_a_good_second_one():
    for folder in ("Actor_12", "more/Actor_12"):
        Path("corpus", folder).mkdir(parents=True)
        written(f"corpus/{folder}/03-01-05-01-02-01-12.wav", speech())
    cut("corpus/Actor_12/03-01-05-01-02-01-12.wav", 500)
    clips, audit = er.index_clips("corpus")
    assert list(clips["path"]) == [str(Path("corpus/more/Actor_12/03-01-05-01-02-01-12.wav"))]
    assert len(audit["left_out"]) == 1 and audit["twins"] == 0


def test_links_to_folders_are_followed_and_may_lead_back():
    touch("real/Actor_01", "03-01-01-01-01-01-01.wav")
    Path("own").mkdir()
    for name, target in (("Actor_01", "real/Actor_01"), ("back", "own"), ("again", "own")):
        Path("own", name).symlink_to(Path(target).absolute())
    clips, audit = er.index_clips("own")
    assert list(clips["clip"]) == ["03-01-01-01-01-01-01"] and audit["twins"] == 0


def test_two_names_with_the_same_bytes_are_both_kept_and_reported(all_names):
    assert len(all_names[0]) == 1440
    assert SAME_BYTES in er.describe_audit(*all_names)


def test_a_corpus_full_of_copies_has_a_short_audit():
    for i in range(70):
        Path(f"{i:02}.wav").write_bytes(b"%d" % (i % 12))
    lines = "\n".join(f"{i:02}.wav,{'happy' if i % 2 else 'sad'}" for i in range(70))
    Path("m.csv").write_text(f"path,emotion\n{lines}")
    sentences = er.describe_audit(*er.index_manifest("m.csv"))
    assert "Same bytes under two names, both kept: 00.wav = 12.wav = 24.wav = 36.wav and 2 more." in sentences
    assert sum("Same bytes" in sentence for sentence in sentences) == 10
    assert "And 2 more groups of clips with the same bytes." in sentences


def test_song_and_video_are_counted_and_left_out():
    touch("corpus", "03-01-05-01-02-01-12.flac", "03-02-05-01-02-01-12.wav", "03-02-04-01-02-01-12.wav",
          "01-01-05-01-02-01-12.mp4", "02-01-05-01-02-01-12.mp4", "01-02-05-01-02-01-12.mp4", "x.wav", "x.md")
    clips, audit = er.index_clips("corpus")
    assert list(clips["clip"]) == ["03-01-05-01-02-01-12"]
    assert audit["files"] == {"speech": 1, "song": 2, "video": 3, "other": 1}


def test_audit_counts_what_is_there_and_what_is_missing(all_names):
    clips, audit = all_names
    full, less = er.describe_audit(clips, audit), er.describe_audit(clips[clips["actor"] > 1], audit)
    assert PER_EMOTION in full and "Missing from the 24 x 60 clips of RAVDESS: 0." in full
    assert "Clips per actor: " + ", ".join(f"{actor}: 60" for actor in range(1, 25)) + "." in full
    assert "Missing from the 24 x 60 clips of RAVDESS: 60, the first 03-01-01-01-01-01-01." in less
    split = er.describe_split(er.split_clips(clips, config()), config())
    assert "test 300 clips of actors 2 5 14 15 16" in split


# %% The download
FOLDER = Path(er.RAVDESS_PATH)
CLIP = "Actor_01/03-01-01-01-01-01-01.wav"


def zipped(files):
    """The bytes of a zip of the files, given as name -> content."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in files.items():
            content.writestr(name, data)
    return memory.getvalue()


@pytest.fixture(scope="session")
def few_clips(tmp_path_factory):
    """Name -> content of the clips of three actors."""
    folder = tmp_path_factory.mktemp("few")
    er.write_demo_corpus(folder, actors=(1, 2, 3), statements=(1,))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("*/*.wav"))}


@pytest.fixture
def zenodo(few_clips, monkeypatch):
    """A server on this machine in place of Zenodo, with a small archive; what it does can be changed."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            it.asked += 1
            self.send_response(403 if "python-requests" in self.headers["User-Agent"] else it.status)
            self.send_header("Content-Length", len(it.content) + it.missing)
            self.end_headers()
            self.wfile.write(it.content)

        def log_message(self, *_):
            pass

    def offer(content):
        """Make these bytes the official archive."""
        it.content, url = content, f"http://127.0.0.1:{server.server_port}/official.zip"
        archive = {"url": url, "size": len(content), "md5": hashlib.md5(content).hexdigest()}
        monkeypatch.setattr(er, "ARCHIVE", archive)

    def stop():
        server.shutdown()  # first: while its thread waits, a closed socket still takes a connection
        server.server_close()

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        it = SimpleNamespace(status=200, missing=0, asked=0, offer=offer, stop=stop)
        offer(zipped(few_clips))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield it
        server.shutdown()
        thread.join()


def download(*argv):
    er.download_corpus(er.parse_settings(["--download", *argv]))


def clips_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.wav")}


def everything():
    """All files, with their contents, and all folders but those above the corpus."""
    return contents("."), {path for path in Path().rglob("*") if path.is_dir()} - {FOLDER.parent}


def test_download_is_all_that_a_run_needs_and_happens_once(zenodo, few_clips, capsys):
    for again in (False, True):
        er.main(["--download", "--phase", "data", "--device", "cpu"])
        assert ("Nothing to download" in capsys.readouterr().out) == again
    assert zenodo.asked == 1 and list(Path("archive").iterdir()) == [FOLDER]
    assert er.find_corpus(config()) == FOLDER and contents(FOLDER).keys() == {
        str(FOLDER / name) for name in few_clips} and clips_in(FOLDER) == few_clips
    assert "24 speech clips of 3 actors" in read_json("outputs/audit.json")["audit"][0]


def test_download_fills_an_empty_folder_of_the_user(zenodo, few_clips):
    Path("my/own").mkdir(parents=True)
    download("--ravdess-path", "my/own/")
    assert clips_in(Path("my/own")) == few_clips and list(Path("my").iterdir()) == [Path("my/own")]


def test_download_finds_the_corpus_in_the_usual_places(zenodo):
    touch("archive/elsewhere", CLIP)
    before = everything()
    download()
    assert zenodo.asked == 0 and everything() == before


def test_download_names_licence_and_citation_first(zenodo, capsys):
    zenodo.status = 404
    with pytest.raises(er.UserError):
        download()
    text = capsys.readouterr().out
    assert "CC BY-NC-SA 4.0" in text and "Livingstone & Russo (2018), PLoS ONE 13(5): e0196391" in text


def test_what_an_interrupted_download_left_is_no_corpus_and_does_not_disturb(zenodo, few_clips):
    part = FOLDER.with_name(FOLDER.name + er.UNFINISHED)
    touch(part, f"clips/{CLIP}", "clips/Actor_09/03-01-01-01-01-01-09.wav", "archive.zip", "tmp123")
    for argv in ([], ["--ravdess-path", "archive"]):
        with pytest.raises(er.UserError):
            er.find_corpus(er.parse_settings(argv))
    download()
    assert clips_in(Path("archive")) == {f"{FOLDER.name}/{name}": data for name, data in few_clips.items()}
    assert not part.exists()


def test_a_download_that_is_stopped_while_it_unpacks_leaves_nothing_and_can_be_repeated(
        zenodo, few_clips, monkeypatch):
    def stop(self, name, folder, extract=zipfile.ZipFile.extract):
        extract(self, name, folder)
        assert clips_in(Path("archive"))
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extract", stop)
        download()
    assert everything() == ({}, set())
    download()
    assert clips_in(FOLDER) == few_clips


@contextlib.contextmanager
def disk_of(size):
    """No file can become larger than `size`; the system says so as it does of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def spoilt(content):
    """The same zip with the bytes in the middle of its largest part turned over."""
    middle = len(content) // 2
    turned = bytes(255 - byte for byte in content[middle:middle + 100])
    return content[:middle] + turned + content[middle + 100:]


BY_HAND, ELSEWHERE = "official.zip|try again|--ravdess-path", f"{FOLDER} cannot|make room|--ravdess-path"
FAILED_DOWNLOADS = {  # what is wrong: (what the sentence must name, how it is made so)
    "wrong md5": (f"{BY_HAND}|md5", lambda zenodo, _: vars(zenodo).update(content=spoilt(zenodo.content))),
    "cut connection": (f"{BY_HAND}|1000 more", lambda zenodo, _: vars(zenodo).update(missing=1000)),
    "not found": (f"{BY_HAND}|404", lambda zenodo, _: vars(zenodo).update(status=404)),
    "no server": (f"{BY_HAND}|refused", lambda zenodo, _: zenodo.stop()),
    "no zip": (f"{BY_HAND}|not a zip", lambda zenodo, _: zenodo.offer(b"<html>Welcome</html>")),
    "half a zip": (f"{BY_HAND}|not a zip", lambda zenodo, _: zenodo.offer(zenodo.content[:50000])),
    "spoilt zip": (f"{BY_HAND}|not a zip", lambda zenodo, _: zenodo.offer(spoilt(zenodo.content))),
    **{f"zip with {name}": (f"{BY_HAND}|{name!r}|outside", lambda zenodo, _, name=name: zenodo.offer(
        zipped({CLIP: b"a", name: b"b"}))) for name in (
            "../evil.wav", "../../../evil.wav", "Actor_01/../../evil.wav", "/evil.wav", r"..\evil.wav",
            r"C:\evil.wav", "C:evil.wav", r"\\server\share\evil.wav")},
    "too little space": (f"{ELSEWHERE}|0.0 GB left", lambda zenodo, patch: patch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * len(zenodo.content) - 1))),
    "folder in use": (f"{ELSEWHERE}|not empty", lambda *_: touch(FOLDER, "notes.txt")),
    "file in the way": (f"{ELSEWHERE}|ot a directory", lambda *_: touch(FOLDER.parent, FOLDER.name)),
    "no folder can be made": (ELSEWHERE, lambda *_: touch(".", FOLDER.parent)),
    "full disk": (f"{ELSEWHERE}|too large", lambda *_: disk_of(100000)),
    "disk full while unpacking": (f"{ELSEWHERE}|too large", lambda zenodo, _: (
        zenodo.offer(zipped({CLIP: bytes(10**6)})), disk_of(100000))[1]),
}


@pytest.mark.parametrize("case", FAILED_DOWNLOADS)
def test_a_download_that_fails_ends_with_one_sentence_and_leaves_nothing(case, zenodo, monkeypatch):
    named, make_so = FAILED_DOWNLOADS[case]
    circumstances = make_so(zenodo, monkeypatch)
    before = everything()
    with circumstances or contextlib.nullcontext(), pytest.raises(er.UserError) as stop:
        download()
    message = str(stop.value)
    assert "\n" not in message and all(words in message for words in named.split("|")), message
    assert everything() == before
    assert zenodo.asked == 0 or ELSEWHERE not in named or "too large" in named  # first what needs no network


@pytest.mark.parametrize("argv", ["", "--ravdess-path nowhere"])
def test_whoever_has_no_corpus_is_told_of_download(argv):
    with pytest.raises(er.UserError, match="--download"):
        er.find_corpus(er.parse_settings(argv.split()))


def test_demo_and_download_contradict():
    with pytest.raises(er.UserError, match=r"--demo.*--download"):
        er.parse_settings(["--demo", "--download"])


# %% Splits
@pytest.mark.parametrize(("fold", "test", "validation"), [
    (0, {2, 5, 14, 15, 16}, {3, 6}), (1, {3, 6, 7, 13, 18}, {10, 11}), (2, {10, 11, 12, 19, 20}, {8, 17}),
    (3, {8, 17, 21, 23, 24}, {1, 14}), (4, {1, 4, 9, 22}, {2, 5})])
def test_folds_are_those_of_the_literature(fold, test, validation, all_names):
    clips = er.split_clips(all_names[0], config(folds=str(fold)))
    actors = {split: set(part["actor"]) for split, part in clips.groupby("split")}
    assert actors == {"test": test, "validation": validation, "train": {*range(1, 25)} - test - validation}


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 99), min_size=3, max_size=40).map(sorted))
def test_any_group_of_actors_is_split_without_overlap_and_each_tested_once(actors):
    tested = []
    for fold in range(min(5, len(actors))):
        validation, test = map(list, er.fold_actors(actors, fold))
        assert test and validation and not {*test} & {*validation} and len(test + validation) < len(actors)
        assert list(map(list, er.fold_actors(list(actors), fold))) == [validation, test]
        tested += test
    assert sorted(tested) == actors


@pytest.mark.parametrize("seed", range(3))
def test_random_split_is_stratified_and_keeps_same_bytes_together(seed, all_names):
    clips = all_names[0].copy()
    clips.loc[::9, "digest"] = clips.loc[4::9, "digest"].to_numpy()  # 160 pairs
    clips = er.split_clips(clips, config(split="random", seed=seed))
    assert clips.groupby("digest")["split"].nunique().max() == 1
    once = clips.drop_duplicates("digest")
    shares = pd.crosstab(once["emotion"], once["split"], normalize="index")[["train", "validation", "test"]]
    assert np.allclose(shares, [0.7, 0.15, 0.15], atol=0.015)


# %% Sentences
def test_bank_holds_thirty_different_sentences_per_emotion_that_do_not_name_it():
    bank = er.sentence_bank()
    assert list(bank) == er.EMOTIONS and {len(sentences) for sentences in bank.values()} == {30}
    assert len({sentence.lower() for sentences in bank.values() for sentence in sentences}) == 240
    assert not [s for emotion, sentences in bank.items() for s in sentences if emotion in er.words_in(s)]


@pytest.mark.parametrize("fold", range(5))
def test_folds_share_no_sentence_but_the_words_of_their_sentences(fold):
    words = {split: [] for split in er.SPLITS}
    for sentences in er.sentence_bank().values():
        parts = {split: er.sentences_of(sentences, split, fold) for split in er.SPLITS}
        assert parts["test"] == sentences[fold::5] and parts["validation"] == sentences[(fold + 1) % 5::5]
        assert sorted(itertools.chain(*parts.values())) == sorted(sentences)
        for split in er.SPLITS:
            words[split] += itertools.chain(*map(er.words_in, parts[split]))
    assert np.isin(words["test"], words["train"]).mean() >= 0.9


@pytest.mark.parametrize("split", ["speaker", "random"])
def test_sentences_are_drawn_reproducibly_and_stay_in_their_split(split, all_names):
    cfg, bank = config(split=split, folds="3"), er.sentence_bank()
    clips = er.split_clips(all_names[0], cfg)
    drawn = er.add_transcripts(clips, cfg, "cpu")
    again = er.add_transcripts(clips.sample(frac=1, random_state=0), cfg, "cpu").sort_index()
    other = er.add_transcripts(clips, config(split=split, folds="3", seed=7), "cpu")
    assert drawn["transcript"].equals(again["transcript"])
    assert (drawn["transcript"] != other["transcript"]).mean() > 0.7 and drawn["transcript"].nunique() > 230
    assert all(c.transcript in er.sentences_of(bank[c.emotion], c.split, 3) for c in drawn.itertuples())
    cache = pickle.loads(Path("outputs/ravdess_transcripts_simulated.pkl").read_bytes())
    assert list(cache.values()) == [t.set_index("clip")["transcript"].to_dict() for t in (drawn, other)]


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 1.0])
def test_noise_deals_exactly_its_share_of_sentences_anew_within_each_split(noise, all_names):
    clips, cfg = er.split_clips(all_names[0], config()), config(sentence_noise=noise)
    emotions = er.deal_emotions(clips, cfg)
    for _, part in clips.assign(dealt=emotions).groupby("split"):
        assert sorted(part["dealt"]) == sorted(part["emotion"])  # a permutation
        changed = (part["dealt"] != part["emotion"]).sum()
        assert changed <= round(noise * len(part))
        assert changed == pytest.approx(noise * len(part) * 7 / 8, abs=0.06 * len(part))
    assert list(er.deal_emotions(clips, cfg)) == list(emotions)


def test_at_full_noise_sentences_are_independent_of_the_emotion(all_names):
    from sklearn.metrics import normalized_mutual_info_score
    clips = er.split_clips(all_names[0], config())
    some, none = (normalized_mutual_info_score(clips["emotion"], er.deal_emotions(clips, config(
        sentence_noise=noise))) for noise in (0.5, 1.0))
    assert none < 0.02 < 0.1 < some


def test_noise_is_marked_and_counted(finished, capsys):
    er.main(["--ravdess-path", str(finished / CORPUS), "--sentence-noise", "0.5", "--phase", "data"])
    audit = read_json("outputs/audit.json")
    assert audit["marks"] == ["text: simulated sentences (oracle, noise 0.5)"]
    clips = pd.read_csv("outputs/clips.csv").query("split == 'train'")
    share = (clips["emotion"] != clips["sentence_emotion"]).mean()
    assert f"{share:.1%} of them with a sentence of another emotion (50.0% dealt anew)" in audit["audit"][-1]
    assert 0.3 < share < 0.5


@pytest.mark.parametrize("fold", range(5))
def test_sentences_of_the_user_are_drawn_and_cross_no_split(fold, all_names):
    write_sentences("own.csv")
    cfg = config(sentences_csv="own.csv", folds=str(fold))
    clips = er.add_transcripts(er.split_clips(all_names[0], cfg), cfg, "cpu")
    assert set(clips["transcript"]) <= set().union(*er.read_sentences("own.csv").values())
    assert clips.groupby("transcript")["split"].nunique().max() == 1
    assert all(row.emotion in row.transcript or row.transcript == "What a day." for row in clips.itertuples())


def test_vocabulary_is_of_the_training_split_only(demo):
    cfg, clips = demo
    clips = clips.assign(transcript=clips["transcript"].where(clips["split"] == "train", "xylophone"))
    model = er.build_model("rnn", clips, cfg, "cpu")
    assert "xylophone" not in model.spec["vocabulary"] and model.spec["vocabulary"][:2] == ["<pad>", "<unk>"]
    assert model.tokenize(["xylophone", ""])["tokens"].tolist() == [[1], [1]]


# %% Sound
def tone(seconds, rate, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def speech(rate=RATE):
    return er.synthesize("angry", 3, np.random.default_rng(0), rate).astype(np.float32)


def written(path, samples, rate=RATE, subtype="PCM_16"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype)
    return Path(path)


@pytest.mark.parametrize("scale", [1, 0.005, 0.0005])
def test_trimming_is_relative_to_the_peak_of_the_clip(scale):
    samples = np.zeros(48000, np.float32)
    samples[16000:32000] = 0.8 * scale
    samples[:200], samples[40000:] = 0.02 * scale, -0.02 * scale  # 32 dB below
    expected = samples[16000 - 800:32000 + 1600 - 1]
    assert np.array_equal(samples[er.loud_part(samples, RATE, 30.0)], expected)
    integers = np.round(samples * -32768 / 0.8).clip(-32768, 32767).astype(np.int16)  # peaks at 16 or more
    assert len(integers[er.loud_part(integers, RATE, 30.0)]) == len(expected)
    assert len(integers[er.loud_part(integers, RATE, 0.0)]) > 0
    assert np.array_equal(samples[er.loud_part(samples, RATE, math.inf)], samples)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_any_sampling_rate_is_resampled(rate):
    samples = er.load_audio(written("tone.wav", tone(1.5, rate), rate), RATE)
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(24000, abs=2)
    assert np.abs(samples[2000:22000] - tone(1.5, RATE)[2000:22000]).max() < 0.01


def test_log_mel_is_that_of_torchaudio_within_float16(demo):
    import torchaudio
    cfg, samples = demo[0], speech()
    transform = torchaudio.transforms.MelSpectrogram(
        RATE, cfg.n_fft, hop_length=cfg.hop_length, f_min=50.0, f_max=8000.0, n_mels=cfg.n_mels, center=True,
        pad_mode="constant")
    expected = (transform(torch.from_numpy(samples)) + 1e-6).log().T.numpy()
    mel = er.log_mel(samples, cfg)
    assert mel.dtype == np.float16 and mel.shape == (1 + len(samples) // cfg.hop_length, cfg.n_mels)
    assert np.abs(mel.astype(float) - expected).max() < 2.0 ** -8 + 1e-3  # half a step between 8 and 16


def test_a_faster_voice_is_heard_higher():
    def loudest(pitch, speed):
        mel = torch.from_numpy(er.log_mel(tone(1, RATE, pitch), config(n_mels=128))[30]).float()
        place = (er.bands_heard(torch.tensor([[speed]]), 128, RATE)[0] + 1) / 2 * 127
        return int(mel[place.round().long().clamp(0, 127)].argmax())
    assert abs(loudest(1000, 1.19) - loudest(1190, 1.0)) <= 1 and loudest(1000, 1.19) > loudest(1000, 1.0) + 3


def test_a_short_clip_is_repeated_at_its_ends_and_a_long_one_cut_in_the_middle(demo):
    cfg, clips = demo
    mels = [np.tile(np.arange(n, dtype=np.float16)[:, None], (1, cfg.n_mels)) for n in (119, 200)]
    dataset = er.ClipDataset(clips[:2].assign(mel=pd.Series(mels)), er.AudioCNN, cfg, "cpu")
    short, long = dataset[[0, 1]]["mel"][:, 0, 5].tolist()  # windows of 160 frames
    assert short == [0] * 21 + list(range(119)) + [118] * 20 and long == list(range(20, 180))


def test_mixup_mixes_labels_as_it_mixes_sound():
    mixed = er.mix({"label": torch.arange(8), "mel": torch.eye(8)}, 8, 0.3)
    assert torch.equal(mixed["mel"], mixed["label"])
    assert torch.allclose(mixed["label"].sum(dim=1), torch.ones(8))


def test_word_dropout_hides_words_but_no_special_tokens(demo):
    cfg, clips = demo
    model = er.build_model("bert", clips, cfg, "cpu")
    plain, hidden = (batch_of(model, clips, cfg, augment)["input_ids"] for augment in (False, True))
    changed, words = plain != hidden, ~torch.isin(plain, torch.tensor(model.special_ids))
    assert (hidden[changed] == model.hidden_id).all() and not changed[~words].any()
    assert changed[words].float().mean() == pytest.approx(cfg.word_dropout, abs=0.1)


# %% Scores
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 8, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert er.fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_temperature_stays_moderate_when_validation_holds_no_mistake():
    assert er.fit_temperature(5 * torch.eye(8), torch.arange(8)) == 0.5


@pytest.mark.parametrize(("confidences", "right", "expected"), [
    ([0.8, 0.8, 0.6, 0.6], [1, 0, 1, 1], (0.6 + 0.8) / 4), ([1.0, 1.0], [1, 1], 0.0),
    ([1.0, 0.98], [0, 1], 0.49)])  # both in the last bin, where errors cancel in part
def test_calibration_error_of_counted_cases(confidences, right, expected):
    probabilities = np.array([[c, 1 - c] for c in confidences])
    assert er.calibration_error(probabilities, 1 - np.array(right)) == pytest.approx(expected)


@pytest.mark.parametrize(("true", "found", "expected"), [
    ([0, 0, 0, 1], [0, 0, 1, 1], (2 / 3 + 1) / 2), ([2, 2, 5, 5], [2, 2, 0, 1], 0.5), ([7], [7], 1.0)])
def test_uar_is_the_mean_recall_of_the_classes_that_occur(true, found, expected):
    assert er.recall(np.array(true), np.array(found)) == pytest.approx(expected)


def test_every_score_of_a_counted_case():
    probabilities = np.full((9, 8), 0.04)
    probabilities[range(9), [0, 1, 2, 3, 4, 5, 6, 6, 1]] = 0.72
    scores = er.score(probabilities, np.array([0, 1, 2, 3, 4, 5, 6, 7, 0]), er.EMOTIONS)
    expected = {"clips": 9, "accuracy": 7 / 9, "uar": 6.5 / 8, "macro_f1": (4 + 3 * 2 / 3) / 8,
                "nll": -(7 * np.log(0.72) + 2 * np.log(0.04)) / 9, "ece": 7 / 9 - 0.72}
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert scores["confusion"][7] == [0, 0, 0, 0, 0, 0, 1, 0] and list(scores["per_class"]) == er.EMOTIONS
    assert json.loads(json.dumps(scores)) == scores  # builtins only


def test_late_fusion_is_the_mean_of_probabilities():
    for stem, column, sure in (("AudioCNN", "sad", 0.9), ("TextRNN", "happy", 0.5)):
        table = pd.DataFrame(0.0, [0, 1], ["true", *er.EMOTIONS]).assign(predicted="?", clip=["a", "b"])
        er.save(Path(f"outputs/predictions/{stem}.csv"), table.assign(**{column: [sure, 1 - sure]}))
    fused = er.combine_late("late_rnn", config())
    assert np.allclose(fused[["sad", "happy"]], [[0.45, 0.25], [0.05, 0.25]])
    assert list(fused["predicted"]) == ["sad", "happy"] and list(fused["clip"]) == ["a", "b"]


def log_probabilities(seed, skill, clips=400):
    """Log-probabilities (N, C) of answers that are better with more skill, chance with 0, and the labels."""
    labels = np.arange(clips) % 8
    logits = np.random.default_rng(seed).normal(size=(clips, 8)) + skill * np.eye(8)[labels]
    return torch.from_numpy(logits).log_softmax(dim=1).numpy(), labels


def test_a_part_at_chance_is_given_hardly_any_weight():
    (good, labels), (chance, _) = log_probabilities(1, 3), log_probabilities(2, 0)
    weights = er.fit_fusion_weights(np.stack([good, 3 * chance]), labels)
    assert weights[0] > 0.8 and 0 <= weights[1] < 0.05


def test_learned_weights_suit_equal_parts_equally_and_never_hurt_on_what_they_saw():
    (first, labels), (second, _) = log_probabilities(1, 1, 4000), log_probabilities(2, 1, 4000)  # calibrated
    logs = np.stack([first, second])
    weights = er.fit_fusion_weights(logs, labels)
    assert weights[0] == pytest.approx(weights[1], rel=0.1) and weights[0] == pytest.approx(1, abs=0.15)

    def nll(weights):
        return F.cross_entropy(torch.from_numpy(np.tensordot(weights, logs, 1)), torch.from_numpy(labels))
    assert nll(weights) < min(nll(np.array(fixed)) for fixed in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)))


def test_learned_weights_balance_the_classes():
    logs, labels = log_probabilities(3, 1)
    rare = np.flatnonzero((labels > 0) | (np.arange(400) < 40))  # class 0 has a tenth of the others
    often = np.concatenate([rare, np.repeat(rare[labels[rare] == 0], 9)])
    some, all_of_them = (er.fit_fusion_weights(logs[None][:, rows], labels[rows]) for rows in (rare, often))
    assert some == pytest.approx(all_of_them, rel=1e-3)



# %% Command line
def constants_of_the_source():
    """Name -> (value, trailing comment) in the table of constants."""
    table = SCRIPT.read_text(encoding="utf-8").split("# fmt: off")[1].split("# fmt: on")[0]
    lines = re.finditer(r"^([A-Z_]+) = (.+?) +# (.+)$", table, re.MULTILINE)
    return {line[1]: (ast.literal_eval(line[2]), line[3]) for line in lines}


def flag(name, value=True):
    return f"--{'' if value is not False else 'no-'}{name.lower().replace('_', '-')}"


def test_every_constant_is_a_flag_and_every_flag_a_constant():
    constants = constants_of_the_source()
    negated = {flag(name, False) for name in constants if er.SETTINGS[name] is bool}
    there = {option for action in er.make_parser()._actions for option in action.option_strings}
    assert there == {"-h", "--help"} | negated | set(map(flag, constants))
    assert er.SETTINGS.keys() == constants.keys()


def test_help_is_the_trailing_comment_of_each_constant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(er.make_parser().format_help().split())
    for name, (value, comment) in constants_of_the_source().items():
        assert f"{comment} (default: {value})" in text, name


def test_readme_lists_the_flags_and_no_others():
    text = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    for name, (value, comment) in constants_of_the_source().items():
        assert f"| `{flag(name)}` | `{value}` | {comment} |" in text, name
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help", "--to"}
    assert named <= {option for action in er.make_parser()._actions for option in action.option_strings}


@pytest.mark.parametrize("name", [n for n in er.SETTINGS if n not in ("DEMO", "RUN_MODELS", "FOLDS")])
def test_every_flag_sets_its_setting(name):
    default = getattr(er, name)
    text = er.CHOICES.get(name.lower(), ("other", "other"))[1]
    value = {bool: lambda: not default, int: lambda: default + 1, float: lambda: default / 2 + 0.1,
             str: lambda: text}[type(default)]()
    argv = [flag(name, value)] if isinstance(default, bool) else [flag(name), str(value)]
    cfg = er.parse_settings(argv)
    assert getattr(cfg, name.lower()) == value != default and cfg.given == [name.lower()]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", [name for name, kind in er.SETTINGS.items() if kind is bool])
def test_boolean_flags_work_both_ways(name, value):
    assert getattr(er.parse_settings([flag(name, value)]), name.lower()) is value


def test_a_constant_edited_at_run_time_counts(monkeypatch):
    monkeypatch.setattr(er, "EPOCHS_CNN", 3)
    assert er.settings_for(er.parse_settings([]), "cnn")["epochs"] == 3
    assert er.settings_for(er.parse_settings(["--epochs-cnn", "4"]), "cnn")["epochs"] == 4
    assert "AudioCNN (default: 3)" in " ".join(er.make_parser().format_help().split())


def test_a_whole_number_may_stand_for_a_constant_with_a_fraction(monkeypatch):
    monkeypatch.setattr(er, "MIXUP", 0)
    monkeypatch.setitem(er.SETTINGS, "MIXUP", int)  # as after the cell of constants ran again
    assert er.parse_settings([]).mixup == 0 and er.parse_settings(["--mixup", "0.5"]).mixup == 0.5


@pytest.mark.parametrize("folds", ["1,", " 1", "1 ,"])
def test_a_list_may_be_written_loosely(folds):
    assert er.parse_settings(["--folds", folds]).folds == "1"


def test_the_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["site-packages/ipykernel_launcher.py", "-f", "kernel.json"])
    assert er.parse_settings() == er.parse_settings([])
    monkeypatch.setattr(sys, "argv", ["emotion_recognition.py", "--seed", "5"])
    assert er.parse_settings().seed == 5


def test_a_model_takes_its_own_constant_before_the_common_one():
    cfg = config(learning_rate=0.1, learning_rate_bert=0.2, epochs_fusion=77)
    assert [er.settings_for(cfg, name)["learning_rate"] for name in ("cnn", "rnn", "bert")] == [0.1, 0.1, 0.2]
    assert {er.settings_for(cfg, name)["epochs"] for name in ("fusion_rnn", "fusion_bert")} == {77}


# %% The models
@pytest.mark.parametrize("name", er.MODELS)
class TestModel:
    def test_logits_do_not_depend_on_batch_mates(self, name, demo):
        cfg, clips = demo
        model = er.build_model(name, clips, cfg, "cpu").eval()
        together = model(batch_of(model, clips[:8], cfg))
        alone = torch.cat([model(batch_of(model, clips[row:row + 1], cfg)) for row in range(8)])
        assert together.shape == (8, len(er.EMOTIONS)) and together.std(dim=0).min() > 0
        assert torch.allclose(together, alone, atol=1e-4)

    def test_gradients_reach_every_parameter_that_is_not_frozen(self, name, demo):
        cfg, clips = demo
        model = er.build_model(name, clips, cfg, "cpu").train()
        batch = batch_of(model, clips, cfg, augment=True)
        F.cross_entropy(model(batch), batch["label"]).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        frozen = {key for key in gradients if key.startswith("encoders.")}
        assert {key for key, grad in gradients.items() if grad is None} == frozen
        assert bool(frozen) == bool(er.MODELS[name].parts)
        still = {key for key in gradients.keys() - frozen if gradients[key].abs().sum() == 0}
        assert [key for key in still if not key.endswith("bias")] == []  # softmax ignores a score's bias

    def test_overfits_one_batch(self, name, demo):
        cfg, clips = SimpleNamespace(**vars(demo[0]) | {"dropout": 0.0}), demo[1][:16]
        model = er.build_model(name, demo[1], cfg, "cpu").train()
        training = er.settings_for(cfg, name) | {"learning_rate": 4e-3, "label_smoothing": 0.0}
        trainer, batch = er.Trainer(model, training, 80, "cpu"), batch_of(model, clips, cfg)
        losses = [trainer.step(dict(batch))[0] for _ in range(80)]
        logits = model.eval()(batch)  # early fusion drops parts in training
        assert torch.equal(logits.argmax(dim=1), batch["label"])
        assert F.cross_entropy(logits, batch["label"]) < 0.5 and losses[0] > 1.5

    def test_checkpoint_gives_the_predictions_that_were_saved(self, name, demo):
        cfg, clips = demo
        path = er.file_of(cfg, "checkpoint", name)
        first, second = er.restore_model(path), er.restore_model(path)
        assert type(first) is er.MODELS[name].kind and not first.training
        dataset = er.ClipDataset(clips, first, cfg, "cpu")
        logits = er.predict(first, dataset)
        assert logits.dtype == torch.float32 and torch.equal(logits, er.predict(second, dataset))
        expected = (logits / torch.load(path, weights_only=True)["temperature"]).softmax(dim=1)
        table = pd.read_csv(er.file_of(cfg, "predictions", name)).set_index("clip")
        assert np.allclose(table.loc[clips["clip"], er.EMOTIONS], expected, atol=1e-5)

    def test_checkpoint_is_self_contained_and_strict(self, name, demo):
        cfg, clips = SimpleNamespace(**vars(demo[0]) | {"bert_model": ENCODER.as_posix()}), demo[1]
        checkpoint = torch.load(er.file_of(cfg, "checkpoint", name), weights_only=True)
        expected = {"classes": er.EMOTIONS, "model": name, "epochs": 1}
        assert not er.differences(checkpoint["fingerprint"], er.fingerprint(cfg, name, clips))
        assert {key: checkpoint[key] for key in expected} == expected and checkpoint["spec"]["classes"] == 8
        assert checkpoint["config"]["seed"] == 42 and checkpoint["versions"]["torch"] == torch.__version__
        assert 0 <= checkpoint["scores"]["uar"] <= 1 and "synthetic" in str(checkpoint["marks"])
        assert "data changed" in er.differences(checkpoint["fingerprint"],
                                                er.fingerprint(cfg, name, clips.assign(digest="other")))
        checkpoint["weights"].popitem()
        torch.save(checkpoint, "less.pth")
        with pytest.raises((RuntimeError, er.UserError)):
            er.restore_model(Path("less.pth"))


@pytest.mark.parametrize("name", READS_TEXT)
def test_padding_never_changes_an_answer(name, demo):
    cfg, clips = demo
    model = er.build_model(name, clips, cfg, "cpu").eval()
    batch = batch_of(model, clips[:8], cfg)
    padded = {key: F.pad(value, (0, 5)) if key in ("tokens", "input_ids", "attention_mask") else value
              for key, value in batch.items()}
    assert torch.allclose(model(batch), model(padded), atol=1e-5)


@pytest.mark.parametrize("name", READS_TEXT)
@pytest.mark.parametrize("text", ["", "...", "qwertz \u00e9\U0001f600", "word " * 600])
def test_any_transcript_has_an_answer(name, text, demo):
    cfg, clips = demo
    model = er.build_model(name, clips, cfg, "cpu").eval()
    assert model(batch_of(model, clips[:2].assign(transcript=text), cfg)).isfinite().all()


@pytest.fixture(scope="session", params=[name for name, row in er.MODELS.items() if row.parts])
def fusion(request, demo):
    """(a new model of early fusion with a head that is not at its start, a batch of clips)."""
    name, cfg, clips = request.param, demo[0], demo[1][:16]
    model, training = er.build_model(name, demo[1], cfg, "cpu").train(), er.settings_for(cfg, name)
    batch, trainer = batch_of(model, clips, cfg), er.Trainer(model, training, 40, "cpu")
    losses = [trainer.step(dict(batch))[0] for _ in range(40)]
    assert np.mean(losses[-5:]) < losses[0]
    return model.eval(), batch


def test_padding_never_changes_an_answer_of_fused_models(fusion):
    model, batch = fusion
    padded = {key: F.pad(value, (0, 5)) if key in ("tokens", "input_ids", "attention_mask") else value
              for key, value in batch.items()}
    assert torch.allclose(model(batch), model(padded), atol=1e-5)


def test_a_fused_model_answers_with_one_modality(fusion):
    """Each answer depends on what is there, not on what is missing."""
    model, batch = fusion
    words = set(model.inputs) - {"mel"}
    heard = {key: value for key, value in batch.items() if key not in words}
    read = {key: value for key, value in batch.items() if key != "mel"}
    for part in (heard, read):
        logits = model(part)
        assert logits.shape == (16, 8) and logits.isfinite().all() and logits.std(dim=0).min() > 0
        assert not torch.allclose(logits, model(batch), atol=1e-3)


def test_attention_reads_the_other_modality_step_by_step_and_nothing_masked():
    torch.manual_seed(0)
    cross = er.CrossAttention(128, 64, 0.0).eval()
    steps, others, mask = torch.randn(2, 5, 128), torch.randn(2, 7, 64), torch.arange(7) < 4
    mask = torch.stack([mask, torch.zeros(7, dtype=torch.bool)])
    found = cross(steps, others, mask)
    assert torch.equal(found[1], steps[1]) and not torch.allclose(found[0], steps[0], atol=1e-2)
    assert torch.allclose(found, cross(steps, others.masked_fill(~mask[..., None], 9.0), mask))


@pytest.mark.parametrize("kind, expected", [("concat", ["fusion_rnn"]), ("attention", ["attention_rnn"]),
                                            ("both", ["fusion_rnn", "attention_rnn"])])
def test_fusion_decides_what_is_trained_and_which_rows_are_shown(kind, expected):
    cfg = er.parse_settings(["--fusion", kind, "--run-models", "cnn,fusion_rnn"])
    assert er.models_to_run(cfg) == ["cnn", *expected]
    assert [name for name in er.rows_of(cfg) if name in er.MODELS and "_rnn" in name] == expected
    for name in expected:
        assert {f"{name}_audio", f"{name}_text"} <= set(er.rows_of(cfg))


@pytest.mark.parametrize("name", [name for name, row in er.MODELS.items() if row.parts])
def test_early_fusion_leaves_its_parts_as_they_were_trained(name, demo):
    def weights(of):
        return torch.load(er.file_of(demo[0], "checkpoint", of), weights_only=True)["weights"]
    for part in er.MODELS[name].parts:
        for key, value in weights(part).items():
            assert torch.equal(value, weights(name)[f"encoders.{part}.{key}"])


def test_training_is_reproducible(demo):
    cfg, clips = demo
    for folder in ("once", "again"):
        torch.rand(3)  # whatever was drawn before must not matter
        er.train_model("rnn", clips, SimpleNamespace(**vars(cfg) | {"output_dir": folder}), "cpu")
    once, again, first = (pd.read_csv(Path(folder, "predictions/TextRNN.csv"))
                          for folder in ("once", "again", cfg.output_dir))
    pd.testing.assert_frame_equal(once, again)
    pd.testing.assert_frame_equal(once, first)


# %% End to end
PLOTS = "samples", "class_counts", "training_curves", "comparison", "reliability"
LEFT = [f"plots/{plot}.png" for plot in PLOTS]
LEFT += "label_encoder.pkl ravdess_transcripts_simulated.pkl metrics.json config.json".split()
LEFT += [f"{folder}.{kind}" for stem in STEMS.values()
         for folder, kind in ((f"predictions/{stem}", "csv"), (f"plots/confusion_{stem}", "png"))]
LEFT += [name.format(STEMS[model]) for model in er.MODELS
         for name in ("{}_best.pth", "histories/{}.csv")]
DOCUMENT = OUTPUT / "emotion_recognition_report.docx"


def checkpoint_times():
    return {path.name: path.stat().st_mtime_ns for path in OUTPUT.glob("*.pth")}


def test_a_run_leaves_everything_that_it_should(finished):
    assert [name for name in LEFT if not (finished / OUTPUT / name).exists()] == []
    assert min((finished / OUTPUT / name).stat().st_size for name in LEFT) > 50


def test_metrics_hold_rows_that_agree_with_the_predictions(finished):
    rows = read_json(finished / OUTPUT / "metrics.json")["rows"]
    assert list(rows) == list(STEMS) and len(rows) == 11
    for name, row in rows.items():
        table = pd.read_csv(finished / OUTPUT / f"predictions/{STEMS[name]}.csv")
        assert row["status"] == "run" and ("oracle" in row["title"]) == (name != "cnn")
        for split in ("validation", "test"):
            part = table[table["split"] == split]
            right = part["true"] == part["predicted"]
            assert row[split]["clips"] == len(part) and row[split]["accuracy"] == pytest.approx(right.mean())
            assert row[split]["uar"] == pytest.approx(right.groupby(part["true"]).mean().mean())
        assert {mistake["clip"] for mistake in row["mistakes"]} <= set(part["clip"][~right])
        assert len(row["mistakes"]) == min(10, (~right).sum())


@pytest.mark.parametrize("stem", STEMS.values())
def test_predictions_keep_the_class_order_and_name_the_strongest(stem, finished):
    table = pd.read_csv(finished / OUTPUT / f"predictions/{stem}.csv")
    probabilities = table[er.EMOTIONS].to_numpy()
    assert [column for column in table if column in er.EMOTIONS] == er.EMOTIONS and table["clip"].is_unique
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    chosen = probabilities[range(len(table)), table["predicted"].map(er.EMOTIONS.index)]
    assert np.allclose(chosen, probabilities.max(axis=1), atol=2e-6)  # ties by rounding to six decimals
    assert list(table["true"].map(er.EMOTIONS.index)) == list(table["clip"].str[6:8].astype(int) - 1)
    assert table["marks"].str.contains("synthetic.*oracle").all()


def test_late_fusion_rows_are_made_of_their_parts(finished):
    tables = {name: pd.read_csv(finished / OUTPUT / f"predictions/{stem}.csv").set_index("clip")[er.EMOTIONS]
              for name, stem in STEMS.items()}
    for name in ("late_rnn", "late_bert"):
        sound, text = (tables[part].loc[tables[name].index] for part in er.ROWS[name].parts)
        assert np.allclose(tables[name], (sound + text) / 2, atol=2e-6)


def test_report_has_its_tables_pictures_and_marks(finished):
    import docx
    document = docx.Document(finished / DOCUMENT)
    for column in ("train acc", "val acc", "macro-F1"):
        holders = [table for table in document.tables
                   if column in [cell.text for cell in table.rows[0].cells]]
        assert [len(table.rows) for table in holders] == [12], column
    assert len(document.inline_shapes) == 5 + len(STEMS)
    text = "\n".join(paragraph.text for paragraph in document.paragraphs)
    for words in ("synthetic", "simulated sentences (oracle)", "python emotion_recognition.py --demo",
                  "actors 3 4 5", "CC BY-NC-SA", "judging people", "one modality missing"):
        assert words in text, words
    assert "synthetic" in document.sections[0].header.paragraphs[0].text


@pytest.mark.parametrize("argv", ["--demo", "--demo --output-dir mine", "--demo --folds 0,1",
                                  "--folds 1,2 --runs 2"])
def test_the_command_of_every_run_names_its_settings_and_folder(argv):
    cfg = er.parse_settings(argv.split())
    again = er.parse_settings(shlex.split(er.described(cfg)["command"])[2:])
    assert er.settings_of(again) == er.settings_of(cfg) and er.runs_of(again) == er.runs_of(cfg)


def test_the_command_that_is_written_down_gives_the_same_settings(finished):
    saved = read_json(finished / OUTPUT / "config.json")
    assert saved["command"].startswith("python emotion_recognition.py --")
    assert er.settings_of(er.parse_settings(saved["command"].split()[2:])) == saved["settings"]


def test_the_same_command_again_trains_nothing(copied, trained):
    before = checkpoint_times()
    er.main(DEMO)
    assert trained == [] and checkpoint_times() == before and len(before) == 7


def test_new_epochs_retrain_the_model_and_what_hangs_on_it(copied, trained):
    before, command = checkpoint_times(), [*DEMO, "--phase", "fusion", "--epochs-cnn", "2"]
    er.main(command)
    after = checkpoint_times()
    assert trained == [name for name in er.MODELS if name not in ("rnn", "bert")]
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {"TextRNN_best.pth", "TextBERT_best.pth"}
    for name in trained:
        assert after[f"{STEMS[name]}_best.previous.pth"] == before[f"{STEMS[name]}_best.pth"]
    assert len(after) == 12 and len(pd.read_csv(OUTPUT / "histories/AudioCNN.csv")) == 2
    er.main(command)
    assert len(trained) == 5 and checkpoint_times() == after


@pytest.mark.parametrize("name", [name for name in ALONE if "rnn" in name])
def test_an_answer_with_one_modality_does_not_know_the_other(name, demo):
    cfg, clips = demo
    changed = (clips.assign(transcript="What a day.") if name.endswith("_audio") else
               clips.assign(mel=[np.zeros_like(mel) for mel in clips["mel"]]))
    answers = er.answer_anew(name, clips, cfg, "cpu")
    pd.testing.assert_frame_equal(answers, er.answer_anew(name, changed, cfg, "cpu"))
    saved = pd.read_csv(er.file_of(cfg, "predictions", name)).set_index("clip").loc[answers["clip"]]
    assert np.allclose(saved[er.EMOTIONS], answers[er.EMOTIONS], atol=1e-5)


def test_the_table_of_missing_modalities_has_every_fused_row(finished):
    figures = read_json(finished / OUTPUT / "metrics.json")
    table = er.result_tables(figures, False)["Test UAR with one modality missing"].set_index("model")
    assert len(table) == 8 and set(figures["alone"]) == set(ALONE)
    uars = {name: f"{row['uar']:.1%}" for name, row in (figures["rows"] | figures["alone"]).items()}
    for name, audio, text in (("learned_rnn", "cnn", "rnn"),
                              ("attention_bert", "attention_bert_audio", "attention_bert_text")):
        expected = [uars[name], uars[audio], uars[text]]
        assert list(table.loc[figures["rows"][name]["title"]]) == expected


# %% The study
STUDY = [*DEMO, "--phase", "study", "--run-models", "cnn,rnn,fusion_rnn"]


def test_the_study_trains_the_words_anew_at_every_noise_and_resumes(copied, trained, monkeypatch):
    monkeypatch.setattr(er, "NOISES", (0.0, 1.0))
    er.main(STUDY)
    assert trained == ["rnn", "fusion_rnn", "attention_rnn"]
    sound = [(OUTPUT / folder / "AudioCNN_best.pth").read_bytes() for folder in ("", "noise_1.0")]
    assert sound[0] == sound[1] and "noise 1.0" in str(read_json(OUTPUT / "noise_1.0/metrics.json")["marks"])
    table = pd.read_csv(OUTPUT / "study.csv")
    assert dict(table.groupby(["noise", "text_model"]).size()) == {
        (0.0, "TextBERT"): 10, (0.0, "TextRNN"): 10, (1.0, "TextRNN"): 10}
    er.main(STUDY)
    assert len(trained) == 3
    import docx
    text = "\n".join(part.text for part in docx.Document(DOCUMENT).paragraphs)
    assert "How reliable must words be" in text and (OUTPUT / "plots/study.png").stat().st_size > 5000
    er.main([*DEMO, "--phase", "fusion", "--epochs-rnn", "2"])  # figures that the study does not know
    assert er.read_study(read_json(OUTPUT / "metrics.json")["rows"], er.parse_settings(STUDY)) is None


def test_a_study_needs_sound_to_compare_words_with():
    er.save(Path("outputs/metrics.json"), {"rows": {"rnn": {"uar": 0.5}}, "alone": {}, "pairs": []})
    with pytest.raises(er.UserError, match="add cnn and rnn or bert to --run-models"):
        er.study_table([config()])


def study_of(noise, text_uar, **uars):
    """Lines of a study with TextRNN, sound at 60 %, every interval 4 points wide."""
    rows = {"cnn": 0.6, "rnn": text_uar} | uars
    return [{"noise": noise, "text_model": "TextRNN", "row": row, "title": er.ROWS[row].title, "uar": uar,
             "text_uar": text_uar, "chance": 0.125, **{f"minus_{key}{end}": uar - other + shift
                                      for key, other in (("audio", 0.6), ("text", text_uar))
                                      for end, shift in (("", 0), ("_low", -0.02), ("_high", 0.02))}}
            for row, uar in rows.items()]


def test_the_findings_say_where_fusion_gains_from_where_on_and_what_is_safe():
    table = pd.DataFrame([
        *study_of(0.0, 0.9, late_rnn=0.91, learned_rnn=0.92, fusion_rnn_audio=0.59, fusion_rnn_text=0.89),
        *study_of(0.5, 0.5, late_rnn=0.63, learned_rnn=0.7),
        *study_of(1.0, 0.125, late_rnn=0.5, learned_rnn=0.6)])
    most, start, useless, safest, alone = er.study_findings(table)
    assert "words alone reach 50.0% UAR and sound alone 60.0%: Learned late fusion then reaches 70.0%" in most
    assert "+10.0 (+8.0 to +12.0)" in most
    assert "once words alone reach 50.0% (Late fusion, Learned late fusion)." in start
    assert "12.5%" in useless and "Late fusion -10.0 (-12.0 to -8.0)" in useless
    assert "safest choice is Learned late fusion" in safest
    assert "words: Learned late fusion +0.0, Late fusion -10.0" in safest
    assert "audio only -1.0 (-3.0 to +1.0)" in alone and "text only -1.0" in alone


def test_report_needs_neither_corpus_nor_model(copied, monkeypatch):
    shutil.rmtree("archive")
    DOCUMENT.unlink()
    (OUTPUT / "plots/comparison.png").unlink()
    monkeypatch.setattr(er, "restore_model", None)
    er.main(["--demo", "--phase", "report"])
    assert DOCUMENT.exists() and (OUTPUT / "plots/comparison.png").exists()


def test_a_report_of_other_models_or_data_is_refused(copied, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "evaluate", 1)  # the model is there, its figures are not
        er.main([*DEMO, "--phase", "unimodal", "--run-models", "rnn", "--epochs-rnn", "2"])
    with pytest.raises(er.UserError, match=r"metrics.json .* models beside it \(TextRNN: epochs 2 -> 1\)"):
        er.main(["--demo", "--phase", "report"])
    er.main([*DEMO, "--phase", "unimodal", "--run-models", "rnn"])
    er.main([*DEMO, "--phase", "data", "--folds", "1"])
    with pytest.raises(er.UserError, match=r"metrics.json .* data beside it, audit.json.*--phase all"):
        er.main(["--demo", "--phase", "report"])


def test_an_old_report_leaves_when_nobody_knows_its_figures(copied):
    er.save(OUTPUT / "metrics.json", ["synthetic"])
    er.main([*DEMO, "--phase", "unimodal"])
    assert not DOCUMENT.exists() and not (OUTPUT / "plots/comparison.png").exists()


def test_without_python_docx_only_the_docx_is_left_out(copied, monkeypatch, capsys):
    real = er.importlib.util.find_spec
    for plot in ("plot_curves", "plot_comparison", "plot_reliability", "plot_confusion"):  # they are there
        monkeypatch.setattr(er, plot, lambda *_: None)
    DOCUMENT.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(er.importlib.util, "find_spec", lambda name, *_: None if name == "docx" else real(name))
        er.main(DEMO)
    assert not DOCUMENT.exists() and "pip install python-docx" in capsys.readouterr().out
    assert [name for name in LEFT if not (OUTPUT / name).exists()] == []
    er.main(["--demo", "--phase", "report"])
    assert DOCUMENT.exists()


def test_rows_that_were_left_out_are_shown_as_not_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(er, "load_text_encoder", None)  # not needed
    er.main(["--ravdess-path", str(finished / CORPUS), "--run-models", "cnn,rnn,fusion_rnn", *TINY])
    rows = read_json("outputs/metrics.json")["rows"]
    left_out = {name for name in rows if rows[name]["status"].startswith("not run: ")}
    assert left_out == {"bert", "fusion_bert", "late_bert", "learned_bert"}
    assert {rows[name]["status"] for name in rows.keys() - left_out} == {"run"}
    assert "not run: left out by --run-models" in capsys.readouterr().out
    import docx
    document = docx.Document("outputs/emotion_recognition_report.docx")
    text = " ".join(cell.text for table in document.tables[:2] for row in table.rows for cell in row.cells)
    assert text.count("not run: ") == 8 and "synthetic" not in " ".join(p.text for p in document.paragraphs)


def test_changed_settings_of_views_are_scored_anew(copied):
    for views in (3, 1):
        er.main([*DEMO, "--phase", "unimodal", "--test-views", str(views)])
        rows = read_json(OUTPUT / "metrics.json")["rows"]
        assert ("cnn_views" in rows) == (views > 1) and rows["cnn"]["status"] == "run"
    views, plain = (pd.read_csv(OUTPUT / f"predictions/{stem}.csv").set_index("clip")[er.EMOTIONS]
                    for stem in ("AudioCNN_views", "AudioCNN"))
    assert set(views.index) == set(plain.index) and not np.allclose(views.loc[plain.index], plain)


def test_a_random_split_marks_everything(finished, capsys):
    er.main(["--ravdess-path", str(finished / CORPUS), "--split", "random", "--run-models", "rnn", "--phase",
             "unimodal", *TINY])
    mark = "speakers shared between splits"
    assert mark in capsys.readouterr().out and mark in Path("outputs/metrics.json").read_text()
    assert pd.read_csv("outputs/predictions/TextRNN.csv")["marks"].str.contains(mark).all()
    assert mark in str(torch.load("outputs/TextRNN_best.pth", weights_only=True)["marks"])


def test_changed_feature_settings_never_meet_old_features(copied, monkeypatch):
    monkeypatch.setattr(er, "plot_samples", lambda *_: None)
    names = []
    for flags in (["--trim-db", "20"], ["--n-mels", "32"], []):
        er.main([*DEMO, "--phase", "data", *flags])
        names.append({path.name for path in OUTPUT.glob("cache/log_mel_*")})
    assert len(set().union(*names)) == 6 and [len(pair) for pair in names] == [2, 2, 2]


def test_an_interrupted_write_leaves_the_old_file():
    er.save(Path("table.json"), {"old": 1})
    with pytest.raises(KeyboardInterrupt), er.replacing("table.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(".").keys() == {"table.json"} and read_json("table.json") == {"old": 1}


def test_demo_never_writes_into_a_folder_that_the_user_named(monkeypatch):
    touch("own", "config.json", "vocab.txt", "pytorch_model.bin")
    before = contents("own")
    monkeypatch.setattr(er, "describe_data", lambda *_: [])
    with contextlib.suppress(er.UserError):
        er.main([*DEMO, "--phase", "data", "--bert-model", "own"])
    assert contents("own") == before


def test_demo_leaves_a_real_run_alone(copied):
    path = OUTPUT / "metrics.json"
    path.write_text(path.read_text(encoding="utf-8").replace("synthetic", "real"), encoding="utf-8")
    before = contents("outputs")
    with pytest.raises(er.UserError, match=r"holds a real run.*--output-dir"):
        er.main(DEMO)
    assert contents("outputs") == before


def test_the_command_line_runs_the_demo():
    done = run_script(*DEMO, "--run-models", "rnn")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "384 speech clips of 24 actors" in read_json(OUTPUT / "audit.json")["audit"][0]
    assert DOCUMENT.exists()


# %% Prediction on one's own recordings
def clip_of(clips, split="test"):
    """The first clip of a split: its path and what is said in it."""
    row = clips[clips["split"] == split].iloc[0]
    return row["path"], row["transcript"], row["clip"]


def test_an_answer_is_that_of_the_predictions_table(demo):
    cfg, clips = demo
    path, text, clip = clip_of(clips)
    answer = er.Predictor(cfg.output_dir).predict(path, text=text)
    assert set(answer.index) == {er.ROWS[name].title for name in STEMS} and answer.index[0] == "AudioCNN"
    for name, stem in STEMS.items():
        saved = pd.read_csv(f"{cfg.output_dir}/predictions/{stem}.csv").set_index("clip").loc[clip]
        line = answer.loc[er.ROWS[name].title]
        assert np.allclose(line[er.EMOTIONS].astype(float), saved[er.EMOTIONS].astype(float), atol=1e-4), name
        assert line["note"] == ("" if name == "cnn" else "trained on simulated sentences")


@pytest.mark.parametrize(("suffix", "rate", "channels", "loudness"), [
    ("wav", 44100, 2, 1), ("flac", 48000, 1, 0.02), ("ogg", 22050, 1, 1), ("mp3", 44100, 2, 0.5),
    ("wav", 8000, 1, 1), ("aiff", 16000, 6, 1)])
def test_any_format_rate_loudness_and_number_of_channels_is_heard(suffix, rate, channels, loudness, demo):
    samples = np.stack([er.soxr.resample(speech(), RATE, rate) * loudness] * channels, axis=1)
    soundfile.write(f"a.{suffix}", samples, rate)
    predictor = er.Predictor(demo[0].output_dir)
    first, second = predictor.predict(f"a.{suffix}"), predictor.predict(samples.T, rate)
    reference = predictor.predict(speech(), RATE)
    for answer in (first, second):
        assert list(answer.index) == ["AudioCNN"] and answer["predicted"].iloc[0] in er.EMOTIONS
        assert np.allclose(answer[er.EMOTIONS], reference[er.EMOTIONS], atol=0.05)
    whole = (samples[:, 0] * 32767).astype(np.int16)
    assert np.allclose(predictor.predict(whole, rate)[er.EMOTIONS], second[er.EMOTIONS], atol=0.01)


def test_librosa_is_asked_for_what_soundfile_cannot_read(demo, monkeypatch):
    import librosa
    touch(".", "a.m4a")
    monkeypatch.setattr(librosa, "load", lambda path, sr: (er.soxr.resample(speech(), RATE, 44100), 44100))
    predictor = er.Predictor(demo[0].output_dir)
    expected = predictor.predict(speech(), RATE)[er.EMOTIONS]
    assert np.allclose(predictor.predict("a.m4a")[er.EMOTIONS], expected, atol=0.05)


@pytest.mark.parametrize("samples", [
    np.zeros(32000), np.zeros(0), np.random.default_rng(0).normal(size=48000) * 0.05,
    np.sin(np.arange(48000) * 0.02) * 0.5, np.pad(np.ones(400) * 0.5, 8000)],
    ids=["silence", "nothing", "hiss", "hum", "click"])
def test_silence_and_steady_noise_are_no_speech(samples, demo):
    predictor = er.Predictor(demo[0].output_dir)
    answer = predictor.predict(samples, RATE, text="What a day.")
    assert list(answer["predicted"]) == ["no speech"] and answer[er.EMOTIONS].isna().all(axis=None)
    assert len(predictor.predict_over_time(samples, RATE)) == 0


def test_a_long_recording_is_cut_into_windows_that_count_by_their_voice(demo):
    predictor = er.Predictor(demo[0].output_dir)
    pause = np.zeros(10 * RATE)
    samples = np.concatenate([pause[:RATE], *[speech()] * 4, pause, *[speech()] * 4])
    course = predictor.predict_over_time(samples, RATE)
    assert course["start"].iloc[0] == pytest.approx(1.15, abs=0.1)
    assert course["end"].iloc[-1] == pytest.approx(len(samples) / RATE, abs=0.2)
    assert np.allclose(np.diff(course["start"])[:-1], 1.28)
    assert np.allclose(course["end"] - course["start"], 2.56)
    assert (course.loc[course["voiced"] == 0, "predicted"] == "no speech").sum() >= 4
    expected = np.average(course[er.EMOTIONS], axis=0, weights=course["voiced"])
    assert np.allclose(predictor.predict(samples, RATE)[er.EMOTIONS], expected)
    assert len(predictor.predict_over_time(samples[:5 * RATE], RATE)) == 1


def test_a_folder_is_answered_file_by_file(copied):
    Path("own/deeper").mkdir(parents=True)
    written("own/deeper/a b.wav", speech())
    for name in ("long", "deeper_long", "deeper/long"):
        written(f"own/{name}.wav", np.tile(speech(), 8))
    touch("own", "broken.mp3", "notes.txt")
    er.main(["--demo", "--phase", "predict", "--input", "own"])
    table = pd.read_csv(OUTPUT / "recordings/predictions.csv").set_index("recording")
    long = ["deeper/long.wav", "deeper_long.wav", "long.wav"]
    assert list(table.index) == ["broken.mp3", "deeper/a b.wav", *long]
    assert "not readable" in table["error"]["broken.mp3"] and table["error"].isna().sum() == 4
    assert set(table["predicted"].dropna()) <= set(er.EMOTIONS)
    assert table["marks"].str.contains("synthetic").all()
    assert len(list((OUTPUT / "recordings").glob("*.wav*.csv"))) == len(long)
    course = pd.read_csv(OUTPUT / "recordings/long.wav.csv")
    assert len(course) > 5 and (OUTPUT / "recordings/long.wav.png").stat().st_size > 10000


def test_json_is_one_document_and_nothing_else(copied, capsys):
    written("a.wav", speech())
    for argv, rows in (([], 1), (["--text", "What a day."], len(STEMS))):
        er.main(["--demo", "--phase", "predict", "--input", "a.wav", "--json", *argv])
        answer = json.loads(capsys.readouterr().out)
        assert answer["recording"] == "a.wav" and len(answer["models"]) == rows
        assert answer["answer"] == answer["models"][0]["predicted"] in er.EMOTIONS
        assert sum(answer["models"][0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["text_source"] == "--text" and answer["text"] == "What a day."


def test_prediction_needs_nothing_but_checkpoints(copied):
    for path in OUTPUT.rglob("*.*"):
        if path.is_file() and path.suffix not in (".pth", ".json"):
            path.unlink()
    shutil.rmtree("archive")
    written("a.wav", speech())
    done = run_script("--demo", "--phase", "predict", "--input", "a.wav", "--text", "What a day.")
    assert done.returncode == 0, done.stderr
    assert "a.wav: " in done.stdout and "##" in done.stdout
    assert "TextBERT (trained on simulated sentences): " in done.stdout


@pytest.mark.parametrize("key, value", [("classes", ["a"] * 8), ("fingerprint", {"cnn epochs": "9"})])
def test_a_fused_model_that_does_not_fit_audio_cnn_is_passed_over(key, value, copied, capsys):
    path = OUTPUT / "EarlyFusion_RNN_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    value = checkpoint[key] | value if key == "fingerprint" else value
    torch.save(checkpoint | {key: value}, "other.pth")
    shutil.move("other.pth", path)
    predictor = er.Predictor(OUTPUT)
    for _ in range(2):
        answer = predictor.predict(speech(), RATE, text="What a day.")
    assert set(answer.index) == {er.ROWS[name].title for name in STEMS if name != "fusion_rnn"}
    warnings = capsys.readouterr().err
    assert warnings.count("EarlyFusion_RNN_best.pth was not trained with the models beside it") == 1


def test_audio_cnn_trained_anew_alone_leaves_nothing_that_was_made_with_the_old_one(copied, capsys):
    er.main([*DEMO, "--phase", "unimodal", "--run-models", "cnn", "--dropout", "0.3"])
    answer = er.Predictor(OUTPUT).predict(speech(), RATE, text="What a day.")
    left = "cnn", "rnn", "bert", "late_rnn", "late_bert"
    assert set(answer.index) == {er.ROWS[name].title for name in left}
    assert capsys.readouterr().err.count("with the models beside it (cnn dropout 0.4 -> 0.3)") == 4


def test_each_answer_says_what_its_own_words_were(copied):
    path = OUTPUT / "TextRNN_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["use_simulated_sentences"] = False
    torch.save(checkpoint, path)
    notes = er.Predictor(OUTPUT).predict(speech(), RATE, text="What a day.")["note"]
    assert set(notes.index[notes == ""]) == {er.ROWS[name].title for name in (
        "cnn", "rnn", "late_rnn", "learned_rnn")}


@pytest.mark.parametrize("flags", ["--fusion concat --epochs-fusion 3", "--test-views 3 --run-models cnn",
                                   "--no-use-simulated-sentences"])
def test_flags_that_do_not_concern_audio_cnn_may_stay_when_predicting(flags, copied, capsys):
    written("a.wav", speech())
    er.main([*DEMO, *flags.split(), "--phase", "predict", "--input", "a.wav"])
    assert "a.wav: " in capsys.readouterr().out


def test_an_answer_that_cannot_be_written_is_still_given(copied, capsys):
    written("own/long.wav", np.tile(speech(), 8))
    touch(OUTPUT / "recordings", "long.wav.csv/in the way", "predictions.csv/in the way")
    er.main(["--demo", "--phase", "predict", "--input", "own", "--json"])
    output = capsys.readouterr()
    (answer,) = json.loads(output.out)
    assert answer["answer"] in er.EMOTIONS and answer["windows"] and not answer["over_time"]
    assert output.err.count("warning: outputs/demo/recordings/") == 2 and "cannot be written" in output.err


def test_names_and_words_that_are_no_text_are_answered(copied, capsys):
    names = ["b" * 240 + ".wav", "folder.wav/c.wav"]
    for name in [*names, ".hidden.wav"]:
        written(f"own/{name}", np.tile(speech(), 8))
    touch("own", os.fsdecode(b"a\xff.wav"))
    er.main(["--demo", "--phase", "predict", "--input", "own", "--text", os.fsdecode(b"\xff hi")])
    table = pd.read_csv(OUTPUT / "recordings/predictions.csv", keep_default_na=False)
    assert set(table.loc[table["error"] == "", "recording"]) == set(names)
    assert set(table.loc[table["error"] != "", "recording"]) == {"a?.wav"}
    assert len(list((OUTPUT / "recordings").glob("*.png"))) == 2


@pytest.mark.parametrize(("dtype", "middle", "scale"), [("uint8", 128, 127), ("int16", 0, 32767),
                                                        ("float64", 0, 1)])
def test_arrays_of_any_type_are_the_same_recording(dtype, middle, scale, demo):
    samples, rate = er.downmix((speech() * scale + middle).astype(dtype), RATE)
    assert rate == RATE and np.allclose(samples, speech(), atol=0.02)


@pytest.mark.parametrize("rate", [None, 0, -1, 0.5, math.inf, math.nan])
def test_an_array_needs_a_sampling_rate(rate):
    with pytest.raises(er.UserError, match="sampling_rate in Hz"):
        er.downmix(speech(), rate)


def test_a_single_run_beside_a_newer_cross_validation_does_not_answer(copied):
    figures = read_json(OUTPUT / "metrics.json")
    figures["settings"]["folds"] = "0,1"
    er.save(OUTPUT / "metrics.json", figures)
    (OUTPUT / "fold_0_seed_42").mkdir()
    with pytest.raises(er.UserError, match=r"several runs: name one of them, --output-dir .*fold_0_seed_42"):
        er.Predictor(OUTPUT)


def test_whisper_is_found_by_the_name_of_its_file_and_loaded_once(copied, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    touch("cache/whisper", "large-v3-turbo.pt")
    loaded = []
    monkeypatch.setattr(er, "load_whisper", lambda name, *_: (loaded.append(name), None))
    monkeypatch.setattr(er, "write_down", lambda waves, *_: ["What a day."])
    for name in ("a", "b"):
        written(f"own/{name}.wav", speech())
    er.main(["--demo", "--phase", "predict", "--input", "own", "--whisper-model", "turbo"])
    assert loaded == ["large-v3-turbo"]
    table = pd.read_csv(OUTPUT / "recordings/predictions.csv")
    assert dict(table["recording"].value_counts()) == {"a.wav": len(STEMS), "b.wav": len(STEMS)}


def test_whisper_is_asked_only_when_its_weights_are_there(copied, capsys, request):
    written("a.wav", speech())
    command = ["--demo", "--phase", "predict", "--input", "a.wav", "--json"]
    er.main(command)
    assert "audio alone" in json.loads(capsys.readouterr().out)["text_source"]
    er.main([*command, "--whisper-model", request.getfixturevalue("tiny_whisper")])
    answer = json.loads(capsys.readouterr().out)
    assert "little.pt" in answer["text_source"] and isinstance(answer["text"], str)
    assert len(answer["models"]) == len(STEMS)


@pytest.mark.benchmark
def test_a_clip_of_four_seconds_is_answered_in_a_hundredth_of_its_time(demo):
    predictor = er.Predictor(demo[0].output_dir)
    written("a.wav", np.resize(speech(), 4 * RATE))
    seconds, = seconds_of(lambda: predictor.predict("a.wav"))
    print(f"\nprediction: {1000 * seconds:.1f} ms for 4 s: {4 / seconds:.0f} times real time")
    assert seconds <= 0.04


# %% Another corpus
OWN_REPORT = "outputs/emotion_recognition_report.docx"


def own_corpus(emotions, speakers=(1, 2, 3, 4), takes=1, **columns):
    """Write clips and own/corpus.csv, columns as functions of (emotion, speaker, take); returns the flags."""
    columns = {"emotion": lambda emotion, *_: emotion, "speaker": lambda _, speaker, __: speaker} | columns
    rng, lines = np.random.default_rng(0), []
    for what in itertools.product(emotions, speakers, range(takes)):
        voice, actor = er.EMOTIONS[emotions.index(what[0]) % 8], speakers.index(what[1])
        touch("own", f"sound/{len(lines):03}.wav")
        path = written(f"own/sound/{len(lines):03}.wav", er.synthesize(voice, actor, rng, RATE))
        lines.append({"path": path.relative_to("own")} | {key: of(*what) for key, of in columns.items()})
    pd.DataFrame(lines).to_csv("own/corpus.csv", index=False)
    return ["--manifest", "own/corpus.csv", *TINY]


def manifest(*lines, header="path,emotion,speaker,split", path="m.csv"):
    """Write a table of clips; files of these names are there, but no sound."""
    Path(path).write_text("\n".join([header, *lines]), encoding="utf-8")
    touch(".", *(line.split(",")[0].replace("\\", "/") for line in lines if line[0] not in ",/"))
    return path


def third(line, last="sad", **options):
    """What writes a manifest with this line as its third."""
    return lambda _: manifest("a.wav,happy,1,train", line, f"c.wav,{last},2,test", **options)


def text_of(path):
    """All text of a .docx, its tables and header too."""
    import docx
    document = docx.Document(path)
    cells = [cell.text for table in document.tables for row in table.rows for cell in row.cells]
    return "\n".join([document.sections[0].header.paragraphs[0].text, *cells,
                      *(part.text for part in document.paragraphs)])


def test_a_manifest_has_its_own_emotions_those_of_ravdess_first_then_by_alphabet():
    clips, audit = er.index_manifest(manifest(
        "b.wav, Zeal ,7,", "x\\a.wav,SAD,12,", "c.wav,pleased  a lot,7,", "d.wav,neutral,7,",
        "/no/e.wav,sad,7,"))
    assert er.classes_of(clips) == ["neutral", "sad", "pleased a lot", "zeal"]
    assert list(clips) == ["clip", "path", "emotion", "actor", "digest"] and audit["lines"] == 5
    assert list(clips["clip"]) == ["b.wav", "c.wav", "d.wav", "x/a.wav"]
    assert clips["actor"].tolist() == [7, 7, 7, 12] and list(audit["left_out"]) == [str(Path("/no/e.wav"))]


@pytest.mark.parametrize("name", ["start", "Voiced", "note", "model", "error", "fold"])
def test_no_emotion_is_called_like_a_column_of_an_answer(name):
    with pytest.raises(er.UserError, match=r"line 3: .* name of a column"):
        er.index_manifest(manifest("a.wav,sad,1,train", f"b.wav,{name},1,train"))


def test_paths_of_a_manifest_start_in_its_folder():
    touch("deep", "sound/a.wav", "sound/b.wav")
    manifest("sound/a.wav,happy", f"{Path.cwd() / 'deep/sound/b.wav'},sad", header="path,emotion",
             path="deep/m.csv")
    clips, audit = er.index_manifest("deep/m.csv")
    there = {Path("deep/sound/a.wav"), Path.cwd() / "deep/sound/b.wav"}
    assert {Path(path) for path in clips["path"]} == there
    assert audit["left_out"] == {} and list(clips["actor"]) == ["", ""]


@pytest.mark.parametrize(("speakers", "expected"), [
    (["2", "10"], [2, 10]), (["02", "10"], ["02", "10"]), (["nan", "1"], ["nan", "1"]),
    (["1.0", "2"], ["1.0", "2"])])
def test_speakers_are_numbers_only_if_all_are_whole_and_plain(speakers, expected):
    clips, _ = er.index_manifest(manifest(f"a.wav,happy,{speakers[0]}", f"b.wav,sad,{speakers[1]}",
                                          header="path,emotion,speaker"))
    assert clips["actor"].tolist() == expected


@pytest.mark.parametrize("fold", range(4))
def test_a_manifest_is_split_by_speaker(fold):
    speakers = ["ann", "bob", "cy", "dee"]
    lines = [f"{name}_{emotion}.wav,{emotion},{name}" for name in speakers for emotion in ("sad", "odd")]
    clips, _ = er.index_manifest(manifest(*lines, header="path,emotion,speaker"))
    cfg = config(folds=str(fold), manifest="m.csv")
    er.adapt_settings(cfg, clips)
    clips = er.split_clips(clips, cfg)
    assert set(clips["actor"][clips["split"] == "test"]) == {speakers[fold]} and cfg.split == "speaker"
    assert clips.groupby("actor")["split"].nunique().max() == 1


@pytest.mark.parametrize(("second", "split", "shared"), [
    ("2", "manifest", ""), ("1", "shared", "1 actors stand in several splits")])
def test_a_split_of_the_manifest_is_kept_and_shared_speakers_are_counted(second, split, shared, monkeypatch):
    lines = [f"{emotion}{place}.wav,{emotion},{speaker},{name}" for emotion in ("sad", "odd")
             for place, (speaker, name) in enumerate((("1", "train"), (second, "Test"), ("3", "validation")))]
    clips, _ = er.index_manifest(manifest(*lines))
    cfg = config(manifest="m.csv")
    er.adapt_settings(cfg, clips)
    clips = er.split_clips(clips, cfg)
    assert list(clips["split"]) == ["train", "test", "validation"] * 2
    sentence = er.describe_split(clips, cfg)
    assert cfg.split == split and sentence.startswith("Split of the manifest: train 2 clips of actors 1; ")
    assert shared in sentence if shared else "stand in" not in sentence
    assert ("speakers shared" in str(er.marks(cfg))) == bool(shared)
    titles = []
    monkeypatch.setattr(er, "save_figure", lambda figure, *_: titles.append(figure.axes[0].get_title()))
    er.plot_counts(clips, cfg)
    assert titles == ["Clips per emotion, 6 in all, split of the manifest"]


def test_without_speakers_the_split_is_random_and_everything_says_so():
    command = own_corpus(["sad", "happy"], takes=3, speaker=lambda *_: "", transcript=lambda *_: "So it is.")
    er.main([*command, "--phase", "unimodal", "--run-models", "rnn"])
    figures, clips = read_json("outputs/metrics.json"), pd.read_csv("outputs/clips.csv")
    assert figures["marks"] == ["random split: speakers shared between splits"]
    assert "No speakers are named" in str(figures["audit"]) and "of actors" not in str(figures["audit"])
    assert set(clips["split"]) == set(er.SPLITS) and figures["rows"]["rnn"]["status"] == "run"
    table = er.read_predictions(config(), "rnn")
    assert list(er.voices_of(table)) == list(table["clip"]) and set(table["actor"]) == {""}


def test_names_that_look_like_something_else_survive_the_whole_pipeline(trained):
    emotions, speakers = ["nan", "null", "$x_y", "<b>&", "1", "happy"], ["001", "NA", "None", "$s_1$"]
    command = own_corpus(emotions, speakers, transcript=lambda emotion, *_: f"<i>& $a_ {emotion}\x07\u4f60")
    command += ["--run-models", "cnn,rnn,fusion_rnn", "--test-views", "2"]
    er.main(command)
    figures = read_json("outputs/metrics.json")
    ran = {name: row for name, row in figures["rows"].items() if row["status"] == "run"}
    assert set(ran) == {"cnn", "cnn_views", "rnn", "fusion_rnn", "late_rnn", "learned_rnn"}
    assert figures["classes"] == ["happy", "$x_y", "1", "<b>&", "nan", "null"]
    assert figures["marks"] == [] and "oracle" not in str([row["title"] for row in ran.values()])
    for name in ran:
        table = er.read_predictions(config(), name)
        assert set(table["actor"]) == set(speakers) and er.classes_of(table) == figures["classes"]
        assert set(table["true"]) == set(emotions) and set(table["predicted"]) <= set(emotions)
    text = text_of(OWN_REPORT)
    for words in ("corpus.csv, unseen speakers", "<b>&", "$x_y", "16.7 %", "001: 6", "of own/corpus.csv"):
        assert words in text, words
    for words in ("RAVDESS,", "oracle", "intensity", "Simulated sentences", "North American"):
        assert words not in text, words
    import docx
    assert min(len(table.rows) for table in docx.Document(OWN_REPORT).tables) > 1
    er.main(command)
    assert trained == ["cnn", "rnn", "fusion_rnn"]


def test_an_emotion_without_sentences_leaves_sound_alone():
    er.main([*own_corpus(["happy", "contempt"]), "--phase", "unimodal"])
    figures = read_json("outputs/metrics.json")
    rows = figures["rows"]
    assert rows["cnn"]["status"] == "run" and figures["marks"] == []
    reason = "not run: no sentences for contempt: add a column transcript to own/corpus.csv"
    assert all(rows[name]["status"].startswith(reason) for name in ("rnn", "bert", "fusion_rnn"))
    assert rows["late_rnn"]["status"] == "not run: TextRNN did not run"


def test_own_sentences_serve_the_emotions_of_a_manifest_and_are_an_oracle():
    emotions = ["happy", "contempt"]
    write_sentences("s.csv", "contempt,Of course.", emotions=emotions)
    er.main([*own_corpus(emotions), "--phase", "data", "--sentences-csv", "s.csv"])
    clips = pd.read_csv("outputs/clips.csv")
    said = {"Of course.": "contempt"}
    drawn = (said.get(text, text.split()[-2]) for text in clips["transcript"])
    assert list(drawn) == list(clips["emotion"])
    assert read_json("outputs/audit.json")["marks"] == ["text: simulated sentences (oracle)"]


NAMES = {  # of the README's corpora: file names with the emotion and speaker that are meant
    "CREMA-D": {"AudioWAV/1001_DFA_ANG_XX.wav": ("angry", "1001"), "1091_WSI_SAD_HI.wav": ("sad", "1091")},
    "TESS": {"OAF_angry/OAF_back_angry.wav": ("angry", "OAF"), "copy/OAF_back_angry.wav": ("angry", "OAF"),
             "YAF_Pleasant/YAF_young_ps.wav": ("surprised", "YAF"), "OAF_dog_fear.wav": ("fearful", "OAF"),
             "OAF_neutral/OA_bite_neutral.wav": ("neutral", "OAF")},
    "SAVEE": {"DC_a01.wav": ("angry", "DC"), "JE/sa01.wav": ("sad", "JE"),
              "KL/KL_su01.wav": ("surprised", "KL"), "AudioData/JK/n30.wav": ("neutral", "JK")},
    "EMO-DB": {"wav/03a01Wa.wav": ("angry", "03"), "wav/16b10Lb.wav": ("bored", "16"),
               "08a02Fe.wav": ("happy", "08"), "03a01Ab.wav": ("fearful", "03")},
}


@pytest.mark.parametrize("corpus", NAMES)
def test_the_recipes_of_the_readme_make_manifests(corpus):
    text = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").split("## Another corpus")[1]
    imports, *recipes = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1].split("\n\n")
    (recipe,) = [code for code in recipes if f'"{corpus}"' in code]
    touch(corpus, *NAMES[corpus])
    exec(f"{imports}\n{recipe}", {})
    clips, audit = er.index_manifest(f"{corpus.lower()}.csv")
    found = {Path(row.clip).name: (row.emotion, str(row.actor)) for row in clips.itertuples()}
    assert found == {Path(name).name: meant for name, meant in NAMES[corpus].items()}
    assert audit["left_out"] == {} and ("transcript" in clips) == (corpus == "TESS")


@pytest.fixture
def evaluated(copied):
    """(figures, clips) of the demo's models on another corpus, of which they know happy and sad."""
    command = own_corpus(["sad", "odd", "happy"], [7, 8], transcript=lambda emotion, *_: f"It is {emotion}.")
    before = contents(OUTPUT)
    er.main([*command, "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    assert before.items() <= contents(OUTPUT).items()
    clips, _ = er.index_manifest("own/corpus.csv")
    return read_json(OUTPUT / "evaluation_corpus/metrics.json"), clips[clips["emotion"] != "odd"]


FOREIGN = OUTPUT / "evaluation_corpus"


def test_trained_models_are_scored_on_the_emotions_that_another_corpus_shares(evaluated):
    figures, clips = evaluated
    assert figures["classes"] == ["happy", "sad"] and list(figures["rows"]) == list(STEMS)
    assert {row["status"] for row in figures["rows"].values()} == {"run"}
    assert "Clips left out, unknown to the models: odd 2." in figures["audit"][-1]
    assert "6 lines in own/corpus.csv: 4 clips of 2 actors are used" in figures["audit"][0]
    assert figures["marks"] == ["models of outputs/demo on another corpus",
                                "in training: synthetic demo corpus: the figures mean nothing",
                                "in training: text: simulated sentences (oracle)"]
    for name, row in figures["rows"].items():
        table = er.read_predictions(config(output_dir=FOREIGN), name)
        assert set(table["clip"]) == set(clips["clip"]) and set(table["true"]) == {"happy", "sad"}
        assert row["uar"] == pytest.approx((table["true"] == table["predicted"]).mean())
        assert row["interval"][0] <= row["uar"] <= row["interval"][1] and "oracle" not in row["title"]
        assert "on another corpus; in training: synthetic" in table["marks"][0]
    document = text_of(FOREIGN / "emotion_recognition_report.docx")
    assert "nothing was fitted on these clips" in document and "50.0 %" in document
    assert {path.stem for path in FOREIGN.glob("plots/*.png")} == {
        "comparison", "reliability", *(f"confusion_{stem}" for stem in STEMS.values())}


def test_a_foreign_answer_is_that_of_the_checkpoint_renormalised(evaluated):
    cfg = config(output_dir=OUTPUT)
    clips, audit = er.index_manifest("own/corpus.csv")
    clips = er.add_features(clips[clips["emotion"] != "odd"], audit, cfg)
    expected, weights = {}, read_json(OUTPUT / "LearnedFusion_RNN.json")
    for name in ("cnn", "rnn", "fusion_rnn"):
        checkpoint = torch.load(er.file_of(cfg, "checkpoint", name), weights_only=True)
        model = er.restore_model(er.file_of(cfg, "checkpoint", name))
        logits = er.predict(model, er.ClipDataset(clips, model, cfg, "cpu"))
        expected[name] = (logits / checkpoint["temperature"]).softmax(dim=1)
    expected["late_rnn"] = expected["cnn"] + expected["rnn"]
    expected["learned_rnn"] = torch.exp(sum(weights[part] * expected[part].log() for part in ("cnn", "rnn")))
    for name, values in expected.items():
        values = values[:, [er.EMOTIONS.index("happy"), er.EMOTIONS.index("sad")]]
        table = er.read_predictions(config(output_dir=FOREIGN), name).set_index("clip").loc[clips["clip"]]
        assert np.allclose(table[["happy", "sad"]], values / values.sum(dim=1, keepdim=True), atol=1e-5), name


def test_a_foreign_corpus_without_words_is_only_heard_as_in_training(copied, monkeypatch):
    command = own_corpus(["happy", "sad"], speaker=lambda *_: "")
    monkeypatch.setattr(er, "N_MELS", 32)
    er.main([*command, "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    figures = read_json(FOREIGN / "metrics.json")
    assert figures["rows"].pop("cnn")["status"] == "run" and figures["settings"]["n_mels"] == 64
    assert {row["status"] for row in figures["rows"].values()} == {
        "not run: own/corpus.csv has no column transcript"}
    assert "intervals draw single clips" in str(figures["audit"])


def test_clips_that_the_models_know_from_training_are_counted(copied):
    clips = pd.read_csv(OUTPUT / "clips.csv")
    (clips[["path", "emotion"]].assign(path=[Path(path).absolute() for path in clips["path"]])
     .to_csv("all.csv", index=False))
    er.main(["--manifest", "all.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    known = (clips["split"] != "test").sum()
    marks = read_json(OUTPUT / "evaluation_all/metrics.json")["marks"]
    assert f"{known} of these {len(clips)} clips are known from training: the figures flatter" in marks


def test_tables_of_the_same_name_do_not_overwrite_each_others_figures(evaluated):
    shutil.copytree("own", "other")
    before = contents(OUTPUT)
    with pytest.raises(er.UserError, match=r"evaluation_corpus holds the figures of own/corpus.csv: move"):
        er.main(["--manifest", "other/corpus.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    assert contents(OUTPUT) == before
    er.save(FOREIGN / "metrics.json", [1])  # not ours: nothing is known of its figures
    er.main(["--manifest", "other/corpus.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    assert read_json(FOREIGN / "metrics.json")["settings"]["manifest"] == "other/corpus.csv"


# %% Resuming
PROCESSES = multiprocessing.get_context("forkserver")  # they import the script once, not each
PROCESSES.set_forkserver_preload(["emotion_recognition", "torch._dynamo"])


def unfinished(demo, folder, epochs=3):
    """The settings of the demo with more epochs, and a folder that holds the checkpoints of the demo."""
    shutil.copytree(demo[0].output_dir, folder, ignore=shutil.ignore_patterns("*.png", "cache"))
    return SimpleNamespace(**vars(demo[0]) | {
        "output_dir": folder, **{f"epochs_{name}": epochs for name in ("cnn", "rnn", "bert", "fusion")}})


def interrupt(patch, owner, name, call, after=False):
    """Let the call of this number, counted from 1, end in a KeyboardInterrupt, at its start or at its end."""
    real, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args):
        number = next(calls)
        if number == call and not after:
            raise KeyboardInterrupt
        result = real(*args)
        if number == call:
            raise KeyboardInterrupt
        return result
    patch.setattr(owner, name, interrupted)


def assert_same_training(name, first, second):
    """Two folders hold the same weights, scores, predictions and history of a model."""
    one, two = (torch.load(Path(folder, f"{STEMS[name]}_best.pth"), weights_only=True)
                for folder in (first, second))
    assert list(one["weights"]) == list(two["weights"]) and one["scores"] == two["scores"]
    assert [key for key, value in one["weights"].items() if not torch.equal(value, two["weights"][key])] == []
    predictions, others = (Path(folder, f"predictions/{STEMS[name]}.csv") for folder in (first, second))
    assert predictions.read_bytes() == others.read_bytes()
    one, two = (pd.read_csv(Path(folder, f"histories/{STEMS[name]}.csv")) for folder in (first, second))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


@pytest.mark.parametrize("name", ["cnn", "rnn", "bert", "fusion_rnn"])
def test_an_interrupted_training_goes_on_to_the_same_weights(name, demo, monkeypatch, capsys):
    whole, parts = unfinished(demo, "whole"), unfinished(demo, "parts")
    er.train_model(name, demo[1], whole, "cpu")
    before, state = contents("parts"), er.file_of(parts, "state", name)
    for call, done in ((3, 2), (1, 2)):  # in the third epoch, and there again at once
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, er, "predict", call)
            er.train_model(name, demo[1], parts, "cpu")
        assert len(torch.load(state, weights_only=True)["history"]) == done
        after = contents("parts")
        assert after.keys() - before.keys() == {str(state)} and before.items() <= after.items()
    torch.rand(3)  # whatever was drawn before must not matter
    er.train_model(name, demo[1], parts, "cpu")
    assert capsys.readouterr().out.count("goes on after epoch 2 of 3") == 2
    assert_same_training(name, "whole", "parts")
    assert not state.exists() and len(pd.read_csv(f"parts/histories/{STEMS[name]}.csv")) == 3


def test_the_state_of_a_longer_training_outlives_a_run_that_reuses_the_shorter_one(copied, monkeypatch):
    command = [*DEMO, "--phase", "unimodal", "--run-models", "rnn"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "predict", 2)
        er.main([*command, "--epochs-rnn", "3"])
    er.main(command)
    assert (OUTPUT / "TextRNN_training.pth").exists()


def test_the_frozen_parts_of_a_fusion_are_not_in_its_state(demo, monkeypatch):
    cfg = unfinished(demo, "parts")
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, er, "predict", 2)
        er.train_model("fusion_rnn", demo[1], cfg, "cpu")
    state = er.file_of(cfg, "state", "fusion_rnn")
    assert state.stat().st_size < er.file_of(cfg, "checkpoint", "fusion_rnn").stat().st_size / 2


def test_a_training_may_stop_between_any_two_writes(demo, monkeypatch):
    cfg = unfinished(demo, "whole", 2)
    old = er.file_of(cfg, "checkpoint", "rnn").read_bytes()
    er.train_model("rnn", demo[1], cfg, "cpu")
    for write in range(1, 7):  # two states, the old checkpoint aside, history, predictions, checkpoint
        cfg = unfinished(demo, f"write_{write}", 2)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, Path, "replace", write, after=True)
            er.train_model("rnn", demo[1], cfg, "cpu")
        assert bool(er.out_of_date(cfg, "rnn", demo[1])) == (write < 6)
        assert er.file_of(cfg, "state", "rnn").exists()
        for name in er.plan_training(demo[1], ["rnn"], cfg, "cpu"):
            er.train_model(name, demo[1], cfg, "cpu")
        assert_same_training("rnn", "whole", cfg.output_dir)
        assert Path(cfg.output_dir, "TextRNN_best.previous.pth").read_bytes() == old
        assert not er.file_of(cfg, "state", "rnn").exists()


def without(path, *keys):
    """Take the last entry out of what a file of torch holds under these keys."""
    content = torch.load(path, weights_only=True)
    functools.reduce(lambda inner, key: inner[key], keys, content).popitem()
    torch.save(content, path)


USELESS = {  # what is wrong with a state: (how it is made so, what is printed)
    "other settings": (lambda _: None, "learning_rate 0.002 -> 0.001"),
    "other data": (lambda _: None, "data changed"),
    "other device": (lambda path: without(path, "fingerprint"), "device None -> cpu "),
    "cut": (lambda path: cut(path, path.stat().st_size - 1000), "RuntimeError"),
    "empty": (lambda path: cut(path, 0), "EOFError"),
    "foreign": (lambda path: torch.save([1], path), "TypeError"),
    "hostile": (lambda path: torch.save(Hostile(), path), "UnpicklingError"),
    "hostile pickle": (lambda path: path.write_bytes(pickle.dumps(Hostile())), "UnpicklingError"),
    "a weight less": (lambda path: without(path, "trainer", "average"), "KeyError"),
    "no schedule": (lambda path: without(path, "trainer", "optimizer"), "KeyError"),
}


@pytest.mark.parametrize("case", USELESS)
def test_a_state_that_does_not_fit_is_passed_over_and_training_starts_anew(case, demo, monkeypatch, capsys):
    spoil, reason = USELESS[case]
    whole, parts = unfinished(demo, "whole", 2), unfinished(demo, "parts", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "predict", 2)
        er.train_model("rnn", demo[1], parts, "cpu")
    spoil(er.file_of(parts, "state", "rnn"))
    clips = demo[1].assign(digest="other") if case == "other data" else demo[1]
    for cfg in (whole, parts):
        cfg.learning_rate = 1e-3 if case == "other settings" else cfg.learning_rate
        er.train_model("rnn", clips, cfg, "cpu")
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "passed over" in line]
    assert "TextRNN_training.pth" in line and reason in line and "goes on after" not in output
    assert_same_training("rnn", "whole", "parts")
    assert not er.file_of(parts, "state", "rnn").exists() and not Path("executed").exists()


def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(finished, tmp_path, monkeypatch):
    command = [*"--device cpu --phase fusion --run-models cnn,rnn,fusion_rnn --epochs-cnn 3".split(),
               *"--epochs-rnn 3 --epochs-fusion 3 --ravdess-path".split(), str(finished / CORPUS)]

    def run(seconds=None):
        """The exit code of the command in a new process, which is killed after so many seconds."""
        process = PROCESSES.Process(target=er.main, args=(command,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    start = time.perf_counter()
    assert run() == 0
    length, draw = time.perf_counter() - start, np.random.default_rng(0)
    monkeypatch.chdir(tmp_path / "killed")
    codes = [run(length * draw.uniform(0.05, 0.3)) for _ in range(10)]
    assert codes.count(-signal.SIGKILL) >= 5 and run() == 0
    for name in ("cnn", "rnn", "fusion_rnn"):
        assert_same_training(name, tmp_path / "whole/outputs", tmp_path / "killed/outputs")
    figures = [read_json(tmp_path / folder / "outputs/metrics.json") for folder in ("whole", "killed")]
    assert figures[0] == figures[1] and not list(Path("outputs").rglob("*_training.pth"))


# %% Two runs on one folder
QUICK = ["--demo", "--device", "cpu", "--phase", "data", "--run-models", "rnn"]


@pytest.mark.parametrize("command", [QUICK, [*QUICK, "--output-dir", str(OUTPUT.parent)],
                                     [*QUICK, "--phase", "report"]])
def test_a_second_run_on_a_folder_stops_at_once_and_changes_nothing(command, copied):
    before = contents("outputs")
    with filelock.FileLock(OUTPUT / "cache/run.lock"), pytest.raises(
            er.UserError, match=rf"another run is at work in {OUTPUT}.*--output-dir"):
        er.main(command)
    assert contents("outputs") == before


def test_a_run_of_several_folds_keeps_others_out_of_their_folders(finished):
    with filelock.FileLock("outputs/fold_1_seed_42/cache/run.lock"):
        for folds in (["--folds", "0,1"], ["--folds", "1", "--output-dir", "outputs/fold_1_seed_42"]):
            with pytest.raises(er.UserError, match="another run is at work in outputs/fold_1_seed_42"):
                er.main(["--ravdess-path", str(finished / CORPUS), "--phase", "data", *folds])


def test_demos_beside_each_other_write_their_corpus_one_after_the_other(monkeypatch):
    def write(folder):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock("archive/demo/run.lock", timeout=0).acquire()
        raise KeyboardInterrupt
    monkeypatch.setattr(er, "write_demo_corpus", write)
    with pytest.raises(KeyboardInterrupt):
        er.main(DEMO)
    filelock.FileLock("archive/demo/run.lock", timeout=0).acquire()


def test_files_that_a_killed_run_was_making_anew_are_not_taken_for_the_old_ones():
    cfg, file = config(), Path("plot.txt")

    def killed():
        file.write_text("new")
        raise KeyboardInterrupt
    for _ in range(2):
        er.reuse("plots", "old settings", [file], cfg, lambda: file.write_text("old"))
        assert file.read_text() == "old"
        with pytest.raises(KeyboardInterrupt):
            er.reuse("plots", "new settings", [file], cfg, killed)


def test_a_folder_is_free_again_after_an_error_an_interrupt_and_a_kill(copied, monkeypatch):
    with pytest.raises(er.UserError, match="none does not exist"):
        er.main(["--ravdess-path", "none", "--output-dir", str(OUTPUT)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "describe_data", 1)
        er.main(QUICK)
    holder = PROCESSES.Process(target=er.main, args=(["--ravdess-path", str(CORPUS), "--run-models", "rnn",
                                                      "--device", "cpu", "--output-dir", str(OUTPUT)],))
    (OUTPUT / "audit.json").unlink()
    holder.start()
    while not (OUTPUT / "audit.json").exists() and holder.is_alive():
        time.sleep(0.01)
    with pytest.raises(er.UserError, match="another run"):
        er.main(QUICK)
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    er.main(QUICK)


def test_help_needs_no_lock_and_a_report_of_nothing_leaves_nothing(capsys):
    with filelock.FileLock("outputs/cache/run.lock"), pytest.raises(SystemExit) as stop:
        er.main(["--help"])
    assert stop.value.code == 0 and "--epochs-cnn" in capsys.readouterr().out
    with pytest.raises(er.UserError, match=r"none.metrics\.json is missing"):
        er.main(["--phase", "report", "--output-dir", "none"])
    assert not Path("none").exists()


# %% Whisper
@pytest.fixture
def tiny_whisper(tmp_path, monkeypatch):
    """A checkpoint of random weights in Whisper's own format; no program is found, ffmpeg neither.

    What random weights say looks invented, and is: here it counts as said.
    """
    from whisper.model import ModelDimensions, Whisper
    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 16, 2, 1, 51865, 16, 16, 2, 1)
    model = Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)  # Whisper leaves it as the memory was
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, "little.pt")
    monkeypatch.setattr(er, "said_in", lambda result: result.text.strip())
    monkeypatch.setenv("PATH", "")
    return str(tmp_path / "little.pt")


def test_whisper_goes_on_where_it_was_stopped(tiny_whisper, demo, monkeypatch):
    from whisper.model import Whisper
    cfg = config(use_simulated_sentences=False, whisper_model=tiny_whisper)
    clips, decode, sizes = demo[1][:10], Whisper.decode, []

    def stopped_in_the_second_batch(self, mels, options):
        if sizes:
            raise KeyboardInterrupt
        return counted(self, mels, options)

    def counted(self, mels, options):
        sizes.append(len(mels))
        return decode(self, mels, options)
    monkeypatch.setattr(Whisper, "decode", stopped_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        er.add_transcripts(clips, cfg, "cpu")
    (kept,) = pickle.loads(Path("outputs/ravdess_transcripts_whisper_little.pkl").read_bytes()).values()
    assert len(kept) == sum(sizes) < 10
    monkeypatch.setattr(Whisper, "decode", counted)
    texts = er.add_transcripts(clips, cfg, "cpu")["transcript"]
    assert sum(sizes) == 10 and texts.map(type).eq(str).all() and texts.str.len().max() > 0
    monkeypatch.setattr(Whisper, "decode", None)  # nothing is left to decode
    assert er.add_transcripts(clips, cfg, "cpu")["transcript"].equals(texts)


def test_a_transcript_that_is_dismissed_is_empty(tiny_whisper, demo, monkeypatch):
    cfg, clips = config(use_simulated_sentences=False, whisper_model=tiny_whisper), demo[1][:4]
    monkeypatch.setattr(er, "said_in", lambda result: "")
    clips = er.add_transcripts(clips, cfg, "cpu")
    assert clips["transcript"].tolist() == [""] * 4
    assert er.describe_transcripts(clips)[0].startswith("Word error rate of Whisper: 100.0%")


def test_whisper_transcripts_feed_a_run_that_is_no_oracle(tiny_whisper, finished):
    for path in (finished / CORPUS).rglob("03-01-*-01-01-01-0[1-3].wav"):
        touch("few", path.name)
        shutil.copy(path, "few")
    er.main(["--ravdess-path", "few", "--no-use-simulated-sentences", "--whisper-model", tiny_whisper,
             "--run-models", "rnn", "--phase", "unimodal", *TINY])
    figures, clips = read_json("outputs/metrics.json"), pd.read_csv("outputs/clips.csv")
    assert "Word error rate of Whisper: " in str(figures["audit"])
    assert len(clips) == 24 and clips["transcript"].notna().any() and figures["marks"] == []
    assert figures["rows"]["rnn"]["status"] == "run" and "oracle" not in figures["rows"]["rnn"]["title"]


@pytest.mark.parametrize(("statement", "heard", "wrong"), [
    (1, "Kids are talking by the door.", 0), (2, "dogs are SITTING by the door", 0), (1, "", 6),
    (1, "Kids are walking by the door", 1), (2, "Dogs sitting by the door", 1),
    (1, "The kids are talking by", 3)])
def test_word_error_rate_of_counted_cases(statement, heard, wrong):
    clips = pd.DataFrame({"statement": [statement, 1], "transcript": [heard, "Kids are talking by the door"]})
    assert er.word_error_rate(clips) == wrong / 12


@pytest.mark.parametrize(("no_speech", "logprob", "compression", "text"), [
    (0.1, -0.3, 1.0, "Thank you."), (0.9, -0.3, 1.0, "Thank you."), (0.9, -1.5, 1.0, ""),
    (0.1, -0.3, 9.0, "")])
def test_what_whisper_makes_out_of_silence_is_an_empty_transcript(no_speech, logprob, compression, text):
    from whisper import DecodingResult
    assert text == er.said_in(DecodingResult(
        audio_features=None, language="en", text=" Thank you. ", no_speech_prob=no_speech,
        avg_logprob=logprob, compression_ratio=compression))


# %% Notebook
def test_the_script_is_a_notebook():
    """The demo by constants, figures inline; edited constants, %run and import work; errors are sentences."""
    source = SCRIPT.read_text(encoding="utf-8").replace("actors=range(1, 25)", "actors=range(1, 7)")
    epochs = {name: 1 for name in er.SETTINGS if name.startswith("EPOCHS")}
    for name, value in (epochs | {"DEMO": True, "RUN_MODELS": "cnn,rnn,fusion_rnn"}).items():
        source, count = re.subn(rf"^{name} = \S+", f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count == 1, name
    notebook = jupytext.reads(source, fmt="py:percent")
    assert notebook.cells[0].cell_type == "markdown" and len(notebook.cells) >= 19
    more = ("DEMO, RAVDESS_PATH = False, 'nowhere'\nmain()",
            f"%run {SCRIPT} --ravdess-path nowhere", f"%run {SCRIPT} --demo --phase report",
            f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport emotion_recognition\n"
            "emotion_recognition.main(['--demo', '--phase', 'report'])")
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in more]
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", allow_errors=True).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10 and DOCUMENT.exists()
    errors = [output for output in outputs if output["output_type"] == "error"]
    assert [error["ename"] for error in errors] == ["UserError"] * 2, errors
    for error in errors:
        assert "nowhere" in error["evalue"] and "--ravdess-path" in error["evalue"]
        assert error["traceback"] == [f"error: {error['evalue']}"]
    assert "SystemExit" not in str(outputs)
    assert all("Report: " in str(cell.outputs) for cell in notebook.cells[-2:])


# %% Bad input that works
@pytest.mark.parametrize(("make", "difference"), [
    (lambda: written("a.wav", speech(8000), 8000), None),
    (lambda: written("a.wav", speech(48000), 48000), None),
    (lambda: written("a.wav", speech(), subtype="PCM_U8"), None),
    (lambda: written("a.wav", speech(), subtype="PCM_24"), 0.01),
    (lambda: written("a.wav", speech(), subtype="FLOAT"), 0.01),
    (lambda: written("a.wav", np.stack([speech(), speech()], axis=1)), 0.01),
    (lambda: written("a.wav", np.stack([speech(), 0 * speech()], axis=1)), None),
    (lambda: written("a.wav", speech() * 0.006), None),
    (lambda: written("a.flac", speech()), 0.01),
    (lambda: written("a.ogg", speech(), subtype="VORBIS"), None),
    (lambda: written("a.mp3", speech(), subtype="MPEG_LAYER_III"), None),
    (lambda: written("a.wav", speech()[6000:10800]), None),
    (lambda: written("a.wav", np.resize(speech(8000), 8000 * 600), 8000), None),
], ids="8kHz 48kHz 8bit 24bit float stereo one-channel quiet flac ogg mp3 0.3s 10min".split())
def test_a_recording_works(make, difference, demo):
    cfg, clips = demo
    mel, plain = er.prepare_clip(make(), cfg), er.prepare_clip(written("plain.wav", speech()), cfg)
    assert isinstance(mel, np.ndarray), mel
    assert mel.shape[1:] == plain.shape[1:] and len(mel) > 10 and np.isfinite(mel).all()
    if difference:
        assert mel.shape == plain.shape and np.abs(mel.astype(float) - plain).mean() < difference
    for augment in (False, True):
        dataset = er.ClipDataset(clips[:1].assign(mel=pd.Series([mel])), er.AudioCNN, cfg, "cpu", augment)
        assert dataset[[0]]["mel"].shape == (1, 1, 64, 160) and dataset[[0]]["mel"].isfinite().all()


# %% Cross-validation
def predictions(seed, clips=400, actors=10, noise=1.0):
    """A predictions table of random answers that are mostly right; every other actor is test."""
    rng = np.random.default_rng(seed)
    row = np.arange(clips)
    logits = rng.normal(size=(clips, 8)) * noise + 2 * np.eye(8)[row % 8]
    table = pd.DataFrame({"clip": [f"{i:04}" for i in row], "actor": row // 8 % actors, "fold": 0,
                          "seed": seed, "split": np.where(row // 8 % 2, "test", "validation"),
                          "true": [er.EMOTIONS[i % 8] for i in row]})
    table[er.EMOTIONS] = torch.from_numpy(logits).softmax(dim=1).numpy()
    return table.assign(predicted=table[er.EMOTIONS].idxmax(axis=1))


def test_a_cluster_is_drawn_as_a_whole_and_as_many_as_there_are():
    clusters = np.array([7, 7, 3, 3, 3, 5])
    weights = er.resampled(clusters, draws=500)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all() and weights.max() == 3
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)


def test_tables_with_the_same_names_share_their_draws():
    few, all_of_them = np.array(["b", "d"]), np.array(["d", "a", "c", "b"])
    assert (er.resampled(few, all_of_them)[:, [1, 0]] == er.resampled(all_of_them)[:, [0, 3]]).all()


def test_an_emotion_that_is_not_drawn_counts_for_nothing():
    table = predictions(1).assign(predicted=lambda table: table["true"])
    assert er.weighted_uar((table[["true"]].T == "sad").to_numpy().astype(int), table) == [1.0]


def test_a_weighted_uar_is_that_of_clips_which_are_there_so_often():
    table, rng = predictions(1), np.random.default_rng(2)
    weights = rng.integers(1, 4, (3, len(table)))
    for row, uar in zip(weights, er.weighted_uar(weights, table)):
        repeated = table.loc[np.repeat(table.index, row)]
        assert uar == pytest.approx(er.recall(repeated["true"], repeated["predicted"]))


def test_the_interval_holds_the_figure_and_is_wide_when_actors_differ():
    table, widths = predictions(3, clips=1600, actors=20), []
    good, bad = (table.assign(predicted=table[column]) for column in ("true", "predicted"))
    for which in (table.index % 2 == 0, table["actor"] < 10):  # as many right answers, spread or by actor
        mixed = good.where(pd.Series(which), bad)
        low, high = np.quantile(er.weighted_uar(er.resampled(mixed["actor"]), mixed), (0.025, 0.975))
        assert low < er.recall(mixed["true"], mixed["predicted"]) < high
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_pooling_averages_log_probabilities_and_calibrates_them_on_validation():
    tables = [predictions(seed, noise=2) for seed in (1, 2, 3)]
    pooled = er.pool(tables)
    logs = np.mean([np.log(table[er.EMOTIONS]) for table in tables], axis=0)
    assert list(pooled["predicted"]) == [er.EMOTIONS[index] for index in logs.argmax(axis=1)]
    ratio = np.log(pooled[er.EMOTIONS].to_numpy())
    slopes = (ratio - ratio.mean(axis=1, keepdims=True)) / (logs - logs.mean(axis=1, keepdims=True))
    assert slopes.std() < 1e-4 * slopes.mean()  # one temperature
    held_out = (pooled["split"] == "validation").to_numpy()
    single = er.score_table(tables[0][held_out])
    assert er.score_table(pooled[held_out])["nll"] < single["nll"]


def test_an_ensemble_joins_the_seeds_of_each_fold():
    tables = [predictions(seed).assign(fold=fold, clip=lambda table, fold=fold: f"{fold}" + table["clip"])
              for seed in (1, 2) for fold in (0, 1)]
    joined = er.ensemble(pd.concat(tables, ignore_index=True))
    assert list(joined["clip"]) == [*tables[0]["clip"], *tables[1]["clip"]]
    for fold, (first, second) in enumerate(zip(tables[:2], tables[2:])):
        logs = np.log(first[er.EMOTIONS].to_numpy()) + np.log(second[er.EMOTIONS].to_numpy())
        expected = [er.EMOTIONS[index] for index in logs.argmax(axis=1)]
        assert list(joined["predicted"][joined["fold"] == fold]) == expected


def test_the_ece_of_calibrated_clips_shrinks_with_their_number():
    table = predictions(4)
    probabilities, clips = table[er.EMOTIONS].to_numpy(), table["clip"].to_numpy()
    few, many = (er.calibration_error_if_perfect(np.tile(probabilities, (n, 1)), np.arange(n * len(clips)))
                 for n in (1, 16))
    assert 0 < many < few / 3 and er.calibration_error_if_perfect(np.eye(8), np.arange(8)) < 1e-6
    twice = er.calibration_error_if_perfect(np.tile(probabilities, (2, 1)), np.tile(clips, 2))
    assert twice == pytest.approx(few)  # a second seed of the same clips makes them no more


def test_unseen_actors_are_validation_in_no_fold():
    assert er.unseen_actors(list(range(1, 25))) == [4, 7, 9, 12, 13, 15, 16, 18, 19, 20, 21, 22, 23, 24]
    assert er.unseen_actors([2, 3, 4, 5]) == []  # one is validation in each fold


def test_figures_of_a_row_are_those_of_its_runs_and_of_all_clips():
    tables = [predictions(seed).assign(fold=seed % 2) for seed in (1, 2)]
    table = pd.concat([*tables, tables[0].assign(split="train")], ignore_index=True)
    figures = er.figures_of(table.assign(intensity=1, sex="male"), np.linspace(0, 1, 101), [1, 3])
    single = [er.score_table(part[part["split"] == "test"])["uar"] for part in tables]
    assert figures["uar"] == pytest.approx(np.mean(single))
    assert figures["by_fold"] == pytest.approx({"1": single[0], "0": single[1]})
    assert figures["interval"] == pytest.approx([0.025, 0.975])
    test = table[table["split"] == "test"]
    fresh = test[test["actor"].isin([1, 3])]
    assert figures["unseen"] == pytest.approx(er.recall(fresh["true"], fresh["predicted"]))
    assert er.figures_of(table.assign(intensity=1, sex="male"), np.ones(3), [])["unseen"] is None


def test_every_fold_and_seed_has_its_own_settings_and_folder():
    cfg = config(folds="3,1", runs=2, seed=5, given=["folds", "runs"])
    runs = er.runs_of(cfg)
    assert [(run.folds, run.seed) for run in runs] == [("3", 5), ("1", 5), ("3", 6), ("1", 6)]
    assert len({run.output_dir for run in runs}) == 4 and {run.cache_dir for run in runs} == {"outputs"}
    assert runs[0].runs == 1
    single = config()
    assert er.runs_of(single) == [single]


def test_cross_validation_pools_all_runs_and_resumes(finished, trained, capsys, monkeypatch):
    for plot in ("plot_counts", "plot_samples", "plot_curves", "plot_reliability", "plot_confusion"):
        monkeypatch.setattr(er, plot, lambda *_: None)
    command = ["--ravdess-path", str(finished / CORPUS), "--phase", "unimodal", "--run-models", "cnn,rnn",
               "--folds", "0,1", "--runs", "2", "--test-views", "2", *TINY]
    er.main(command)
    assert trained == ["cnn", "rnn"] * 4
    figures = read_json("outputs/metrics.json")
    rows = {name: row for name, row in figures["rows"].items() if row["status"] == "run"}
    assert list(rows) == ["cnn", "cnn_views", "cnn_ensemble", "cnn_views_ensemble", "rnn", "late_rnn",
                          "learned_rnn"]
    out_of_fold = pd.read_csv("outputs/predictions/TextRNN_out_of_fold.csv")
    tables = [pd.read_csv(f"outputs/fold_{fold}_seed_{seed}/predictions/TextRNN.csv")
              for fold in (0, 1) for seed in (42, 43)]
    single = [er.score_table(table[table["split"] == "test"])["uar"] for table in tables]
    assert len(out_of_fold) == sum((table["split"] == "test").sum() for table in tables)
    assert rows["rnn"]["uar"] == pytest.approx(np.mean(single))
    right = out_of_fold["true"] == out_of_fold["predicted"]
    assert rows["rnn"]["test"]["accuracy"] == pytest.approx(right.mean())
    assert 2 * rows["cnn_ensemble"]["test"]["clips"] == rows["cnn"]["test"]["clips"] == len(right)
    low, high = rows["cnn"]["interval"]
    assert low <= rows["cnn"]["test"]["uar"] <= high and set(rows["cnn"]["by_fold"]) == {"0", "1"}
    assert len(figures["pairs"]) == 21 and all(
        pair["difference_low"] <= pair["difference_high"] for pair in figures["pairs"])
    assert "AudioCNN, ensemble, views" in capsys.readouterr().out
    er.main(command)
    assert len(trained) == 8
    with pytest.raises(er.UserError, match=r"--folds 0 contradicts .*metrics\.json .0,1."):
        er.main(["--phase", "report", "--folds", "0"])
    monkeypatch.setattr(
        er, "plot_paths", lambda rows, cfg: [er.plot_path("cross_validation", cfg)] if rows else [])
    er.main(["--phase", "report"])
    import docx
    document = docx.Document("outputs/emotion_recognition_report.docx")
    text = " ".join(paragraph.text for paragraph in document.paragraphs)
    assert len(document.inline_shapes) == 1 and "Paired differences" in text
    assert all(flag in text for flag in ("--folds 0,1", "--runs 2", "--test-views 2"))


def test_reports_of_several_folds_and_of_one_do_not_mix(finished):
    command = ["--ravdess-path", str(finished / CORPUS), "--run-models", "rnn", *TINY]
    page, document = (Path("outputs", name) for name in ("plots/cross_validation.png", DOCUMENT.name))
    er.main([*command, "--folds", "0,1"])  # a single row has no pairs
    assert page.exists() and document.exists()
    er.main([*command, "--phase", "unimodal"])
    assert not page.exists() and not document.exists() and Path("outputs/plots/samples.png").exists()


def test_a_checkpoint_of_another_version_is_trained_anew(copied):
    cfg = er.parse_settings(DEMO)
    path = er.file_of(cfg, "checkpoint", "cnn")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["fingerprint"].pop("version")
    checkpoint["weights"]["trait_heads.weight"] = torch.zeros(3, 256)
    torch.save(checkpoint, path)
    assert "version None -> " in er.out_of_date(cfg, "cnn", None)
    with pytest.raises(er.UserError, match="another version"):
        er.restore_model(path)


def test_one_seed_gives_the_same_weights_in_a_new_process_and_another_seed_others(finished):
    corpus = str(finished / CORPUS)
    command = ["--ravdess-path", corpus, "--phase", "unimodal", "--run-models", "cnn,rnn", *TINY]
    done = run_script(*command, "--output-dir", "first")
    assert done.returncode == 0, done.stderr
    for folder, seed in (("second", "42"), ("third", "43")):
        er.main([*command, "--output-dir", folder, "--seed", seed])
    for stem in ("AudioCNN", "TextRNN"):
        first, second, third = (torch.load(f"{folder}/{stem}_best.pth", weights_only=True)["weights"]
                                for folder in ("first", "second", "third"))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["head.weight"], third["head.weight"])


# %% Bad input that is left out
def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def with_sample(value):
    return np.append(speech(), np.float32(value))


BROKEN = {  # what is wrong with a clip: (how it is made so, what the reason says)
    "header cut": (lambda path: cut(path, 20), "cut off"),
    "data cut": (lambda path: cut(path, path.stat().st_size // 2), "cut off"),
    "zero length": (lambda path: cut(path, 0), "not readable"),
    "text": (lambda path: path.write_text("no sound"), "not readable"),
    "no samples": (lambda path: written(path, speech()[:0]), "no samples"),
    "silence": (lambda path: written(path, 0 * speech()), "silent"),
    "NaN": (lambda path: written(path, with_sample(np.nan), subtype="FLOAT"), "NaN, infinite"),
    "infinite": (lambda path: written(path, with_sample(np.inf), subtype="FLOAT"), "NaN, infinite"),
    "wrong code": (lambda path: path.rename(path.with_name("03-01-09-01-02-01-03.wav")), "none of RAVDESS's"),
}


def test_unusable_clips_are_named_and_left_out_and_the_run_goes_on(finished, capsys):
    shutil.copytree(finished / CORPUS, "corpus")
    reasons = {}
    clips = (f"corpus/Actor_{actor:02}/03-01-{emotion:02}-01-02-01-{actor:02}.wav"
             for actor in (3, 4) for emotion in range(1, 9))  # of training
    for path, (spoil, reason) in zip(map(Path, clips), BROKEN.values(), strict=False):
        renamed = spoil(path)
        reasons[str(renamed if isinstance(renamed, Path) else path)] = reason
    for _ in range(2):  # the second time from the cache
        er.main(["--ravdess-path", "corpus", "--phase", "unimodal", "--run-models", "rnn", *TINY])
        audit, output = read_json("outputs/audit.json")["audit"], capsys.readouterr().out
        left_out = [sentence for sentence in audit if sentence.startswith("Left out: ")]
        assert f"{96 - len(BROKEN)} speech clips" in audit[0] and len(left_out) == len(reasons)
        for path, reason in reasons.items():
            assert any(f"Left out: {path}: " in line and reason in line for line in left_out)
        assert "\n".join(left_out) in output
    assert len(pd.read_csv("outputs/predictions/TextRNN.csv")) == 96 - len(BROKEN)


def test_a_flac_file_that_was_cut_is_left_out():
    path = written("a.flac", speech())
    cut(path, path.stat().st_size // 2)
    assert isinstance(er.prepare_clip(path, config()), str)


def test_a_flac_file_of_unknown_length_is_left_out():
    path = written("a.flac", speech())
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples, 36 bits
    path.write_bytes(content)
    assert isinstance(er.prepare_clip(path, config()), str)


# %% Bad input that ends the run
class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def remove(pattern, folder="own"):
    for path in [path for path in Path(folder).rglob(pattern) if path.is_file()]:
        path.unlink()


def rename_mask(folder):
    """A text encoder whose special tokens are not BERT's."""
    shutil.copytree(ENCODER, folder)
    for path in Path(folder).glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("[MASK]", "<mask>"), encoding="utf-8")


def write_sentences(path, third="happy,What a day.", last=5, emotions=er.EMOTIONS):
    """A table of five sentences an emotion, `last` for the last one, with `third` as its third line."""
    lines = [f"{emotion},Sentence {emotion} {number}" for emotion in emotions
             for number in range(last if emotion == emotions[-1] else 5)]
    Path(path).write_text("\n".join(["emotion,sentence", lines[0], third, *lines[1:]]), encoding="utf-8")


def break_torchaudio(monkeypatch):
    """Put a torchaudio first whose library does not fit the installed torch."""
    touch(".", "torchaudio/functional.py")
    Path("torchaudio/__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(Path.cwd()))


CNN, CACHE = OUTPUT / "AudioCNN_best.pth", OUTPUT / "ravdess_transcripts_simulated.pkl"
OWN, REPORT, OWN_CSV = f"--ravdess-path {CORPUS}", "--demo --phase report", "--manifest m.csv"
FUSE = "--demo --phase fusion --run-models fusion_rnn"
WHISPER = f"{OWN} --phase data --no-use-simulated-sentences --whisper-model"
ONE_SENTENCE = {  # what is wrong: (command line, what the sentence must name, how it is made so)
    "mistyped flag": ("--epoch-cnn 3", "--epoch-cnn"),
    "abbreviated flag": ("--epochs-cn 3", "--epochs-cn"),
    "wrong type": ("--epochs-cnn many", "--epochs-cnn|many"),
    "no epochs": ("--epochs-cnn 0", "--epochs-cnn 0"),
    "share above one": ("--dropout 1.5", "--dropout 1.5"),
    "not a number": ("--mixup nan", "--mixup nan"),
    "unknown phase": ("--phase train", "--phase|train|fusion"),
    "unknown model": ("--run-models cnn,lstm", "--run-models|lstm|fusion_rnn"),
    "unknown fold": ("--folds 0,7", "--folds|0,7"),
    "a fold twice": ("--folds 1,1", "--folds|different"),
    "tokenizer of another family": (f"{OWN} --bert-model roberta", "special tokens|--run-models",
                                    lambda _: rename_mask("roberta")),
    "folds of a random split": ("--folds 0,1 --split random", "--folds|--split random"),
    "no such device": (f"{OWN} --device cuda", "--device cuda",
                       lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False)),
    "demo and corpus": (f"{OWN} --demo", "--ravdess-path|--demo"),
    "no corpus": ("", f"zenodo.org|--ravdess-path|--demo|{Path(er.RAVDESS_PATH)}|kaggle"),
    "no such path": ("--ravdess-path nowhere", "nowhere|does not exist|--ravdess-path"),
    "path is a file": ("--ravdess-path it", "it|is a file|--ravdess-path", lambda _: touch(".", "it")),
    "path is empty": ("--ravdess-path none", "none|is empty|--ravdess-path", lambda _: Path("none").mkdir()),
    "other audio": ("--ravdess-path own", "own|03-01-|--ravdess-path",
                    lambda _: (remove("*.wav"), touch("own", "memo.wav"))),
    "only wrong codes": ("--ravdess-path own", "own|--ravdess-path",
                         lambda _: (remove("*.wav"), touch("own", "03-01-09-01-01-01-01.wav"))),
    "only broken clips": ("--ravdess-path own", "own|--ravdess-path",
                          lambda _: (remove("*.wav"), touch("own", "03-01-01-01-01-01-01.wav"))),
    "one actor": ("--ravdess-path own", "1 actor|--ravdess-path", lambda _: remove("*-0[2-6].wav")),
    "too few actors": ("--ravdess-path own --folds 3", "3 actor|--folds", lambda _: remove("*-0[4-6].wav")),
    "vanished class": ("--ravdess-path own", "disgust|--ravdess-path", lambda _: remove("03-01-07-*")),
    "no place to write": (f"{OWN} --output-dir it/x", "it|--output-dir", lambda _: touch(".", "it")),
    "full disk": (OWN, "outputs|--output-dir",
                  lambda patch: patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))),
    "broken torchaudio": (OWN, 'torchaudio|pip install "torch', break_torchaudio),
    "nothing to report": ("--phase report --output-dir none", "none|--phase all"),
    "other settings": (f"{REPORT} --epochs-cnn 9", f"--epochs-cnn 9|{OUTPUT / 'metrics.json'} (1)"),
    "report, cut": (REPORT, f"{CNN}|--phase", lambda _: cut(CNN, 5000)),
    "report, foreign": (REPORT, f"{CNN}|--phase", lambda _: torch.save({"a": 1}, CNN)),
    "report, hostile": (REPORT, f"{CNN}|--phase", lambda _: torch.save(Hostile(), CNN)),
    "report, hostile pickle": (REPORT, f"{CNN}|--phase", lambda _: CNN.write_bytes(pickle.dumps(Hostile()))),
    "report, metrics cut": (REPORT, "metrics.json|--phase all", lambda _: cut(OUTPUT / "metrics.json", 200)),
    "report, metrics of another kind": (
        REPORT, "metrics.json|--phase all", lambda _: er.save(OUTPUT / "metrics.json", [{"rows": 1}])),
    "report, audit of another kind": (
        REPORT, "audit.json|--phase all", lambda _: er.save(OUTPUT / "audit.json", [1])),
    "report, foreign metrics": (REPORT, "metrics.json|--phase all",
                                lambda _: (OUTPUT / "metrics.json").write_text("{}")),
    "no recording named": ("--demo --phase predict", "--input"),
    "no such recording": ("--demo --phase predict --input a.wav", "a.wav|does not exist|--input"),
    "no recordings": ("--demo --phase predict --input own", "own|holds no recordings|--input",
                      lambda _: remove("*")),
    "a recording of text": ("--demo --phase predict --input a.wav", "a.wav|not readable|--input",
                            lambda _: touch(".", "a.wav")),
    "nothing trained": ("--phase predict --input own --output-dir none", f"{Path('none', CNN.name)}|--phase"),
    "several runs": ("--phase predict --input own --output-dir many", str(Path("many", "fold_0_seed_42")),
                     lambda _: touch("many/fold_0_seed_42", "a")),
    "predict, hostile": ("--demo --phase predict --input own", f"{CNN}|--phase",
                         lambda _: torch.save(Hostile(), CNN)),
    "predict, other settings": ("--demo --phase predict --input own --n-mels 80", f"--n-mels 80|{CNN}"),
    "fusion, part missing": (FUSE, f"{CNN}|--run-models", lambda _: CNN.unlink()),
    "fusion, part cut": (FUSE, f"{CNN}|--run-models", lambda _: cut(CNN, 5000)),
    "fusion, part foreign": (FUSE, f"{CNN}|--run-models", lambda _: torch.save([1], CNN)),
    "hostile cache": ("--demo", f"{CACHE}|--output-dir",
                      lambda _: CACHE.write_bytes(pickle.dumps(Hostile()))),
    "cut cache": ("--demo", f"{CACHE}|--output-dir", lambda _: cut(CACHE, 100)),
    "BERT without weights": (f"{OWN} --bert-model own", "--bert-model own|--run-models cnn,rnn,fusion_rnn",
                             lambda _: touch("own", "config.json")),
    "BERT without hub": (f"{OWN} --bert-model no/one", "--bert-model no/one|--run-models cnn,rnn,fusion_rnn"),
    "a sentence of no emotion": (f"{OWN} --sentences-csv s.csv", "s.csv line 3|'bored'|--sentences-csv",
                                 lambda _: write_sentences("s.csv", "bored,So what.")),
    "a sentence twice": (f"{OWN} --sentences-csv s.csv", "s.csv line 3|line 2 again|--sentences-csv",
                         lambda _: write_sentences("s.csv", "happy,Sentence neutral 0!")),
    "a sentence without words": (f"{OWN} --sentences-csv s.csv", "s.csv line 3|no words",
                                 lambda _: write_sentences("s.csv", "happy,...")),
    "a comma too many": (f"{OWN} --sentences-csv s.csv", "s.csv line 3|columns",
                         lambda _: write_sentences("s.csv", "happy,Well, yes.")),
    "too few sentences": (f"{OWN} --sentences-csv s.csv", "s.csv|4 of 5|surprised",
                          lambda _: write_sentences("s.csv", "sad,One more.", last=4)),
    "no sentence table": (f"{OWN} --sentences-csv s.csv", "s.csv|CSV|--sentences-csv"),
    "other columns": (f"{OWN} --sentences-csv s.csv", "s.csv|line 1",
                      lambda _: Path("s.csv").write_text("a,b\n1,2\n")),
    "manifest and demo": (f"--demo {OWN_CSV}", "--manifest m.csv|--demo"),
    "manifest and corpus": (f"{OWN} {OWN_CSV}", "--manifest m.csv|--ravdess-path"),
    "no manifest": (OWN_CSV, "m.csv|CSV|--manifest"),
    "manifest, no emotions": (OWN_CSV, "m.csv|path and emotion in line 1|--manifest",
                              third("b.wav", header="path,feeling")),
    "manifest, no path": (OWN_CSV, "m.csv line 3|no path|--manifest", third(",sad,1,train")),
    "manifest, no emotion": (OWN_CSV, "m.csv line 3|no emotion", third("b.wav, ,1,train")),
    "manifest, a path twice": (OWN_CSV, "m.csv line 3|line 2 again", third("./a.wav,sad,1,train")),
    "manifest, no such split": (OWN_CSV, "m.csv line 3|'dev'|validation", third("b.wav,sad,1,dev")),
    "manifest, no split": (OWN_CSV, "m.csv line 3|''|validation", third("b.wav,sad,1,")),
    "manifest, no speaker": (OWN_CSV, "m.csv line 3|no speaker", third("b.wav,sad,,train")),
    "manifest, a column's name": (OWN_CSV, "m.csv line 3|'Accuracy'", third("b.wav,Accuracy,1,test")),
    "manifest, a comma too many": (OWN_CSV, "m.csv line 3|quote", third("b.wav,so, so,1,train")),
    "manifest, a column twice": (OWN_CSV, "m.csv line 1|emotion twice|--manifest", third(
        "b.wav,sad,1,odd", header="path,emotion,speaker,emotion")),
    "manifest, a zero byte": (OWN_CSV, "m.csv|zero byte|--manifest", third("b.wav,sad\0,1,train")),
    "manifest, one emotion": (OWN_CSV, "m.csv|two emotions", third("b.wav,HAPPY,1,train", "happy")),
    "manifest, no files": (OWN_CSV, "no clip in m.csv|--manifest",
                           lambda patch: (third("b.wav,sad,1,test")(patch), remove("[abc].wav", "."))),
    "manifest, folds of a split": (f"{OWN_CSV} --folds 1", "m.csv|column split|--folds",
                                   third("b.wav,sad,1,train")),
    "manifest, runs of a split": (f"{OWN_CSV} --runs 2", "m.csv|column split|--runs",
                                  third("b.wav,sad,1,train")),
    "manifest, split twice": (f"{OWN_CSV} --split random", "m.csv|column split|--split random",
                              third("b.wav,sad,1,train")),
    "manifest, nobody's folds": (f"{OWN_CSV} --folds 1", "m.csv|no column speaker|--folds",
                                 third("b.wav,sad", header="path,emotion,a,b")),
    "manifest, a split empty": ("--manifest own/corpus.csv --run-models cnn", "no happy|for validation|--m",
                                lambda _: own_corpus(["happy", "sad"], split=lambda *_: "train")),
    "manifest, two speakers": ("--manifest own/corpus.csv --run-models cnn", "2 actor|--manifest|--split",
                               lambda _: own_corpus(["happy", "sad"], [1, 2])),
    "manifest, no words": (f"{OWN_CSV} --run-models rnn", "no sentences for odd|transcript|m.csv",
                           third("b.wav,odd,1,train")),
    "manifest, study of transcripts": (f"{OWN_CSV} --phase study", "--phase study|m.csv|transcripts",
                                       third("b.wav,sad,1,So", header="path,emotion,speaker,transcript")),
    "evaluate, no manifest": ("--phase evaluate", "--phase evaluate|--manifest"),
    "evaluate, other settings": (
        f"--manifest own/corpus.csv --phase evaluate --output-dir {OUTPUT} --n-mels 32",
        f"--n-mels 32|{CNN}|n_mels 64 -> 32", lambda _: own_corpus(["happy", "sad"])),
    "evaluate, no model": (f"{OWN_CSV} --phase evaluate --output-dir none", "AudioCNN_best.pth|--output-dir"),
    "evaluate, nothing in common": (
        f"{OWN_CSV} --phase evaluate --output-dir {OUTPUT}", "m.csv|no emotion|neutral",
        lambda _: manifest("a.wav,odd", "b.wav,bored", header="path,emotion")),
    "manifest, sentences of others": (
        f"{OWN_CSV} --sentences-csv s.csv", "s.csv line 3|'odd' is none of happy, sad|--sentences-csv",
        lambda patch: (third("b.wav,sad,1,train")(patch),
                       write_sentences("s.csv", "odd,Well.", emotions=["happy", "sad"]))),
    "Whisper of text": (f"{WHISPER} a.pt", "--whisper-model a.pt", lambda _: touch(".", "a.pt")),
    "Whisper of others": (f"{WHISPER} a.pt", "--whisper-model a.pt", lambda _: torch.save({"a": 1}, "a.pt")),
}


# Anything at all: EXAMPLES=10000 pytest -k anything
anything = settings(max_examples=int(os.environ.get("EXAMPLES", 100)), deadline=None)
SOUND = st.sampled_from(["wav", "flac", "ogg", "mp3"])


def damaged(content):
    """Strategy: bytes of which some are overwritten, cut off or put in."""
    place = st.integers(0, len(content))
    return st.lists(st.tuples(place, place, st.binary(max_size=20)), max_size=4).map(
        lambda changes: functools.reduce(
            lambda data, change: data[:min(change[:2])] + change[2] + data[max(change[:2]):]
            if abs(change[0] - change[1]) < 2000 else data[:change[0]] + change[2], changes, content))


@anything
@given(st.data(), SOUND)
def test_anything_in_an_audio_file_is_a_spectrogram_or_a_reason(data, kind):
    memory = io.BytesIO()
    soundfile.write(memory, speech()[:4000], RATE, format=kind)
    Path(f"a.{kind}").write_bytes(data.draw(damaged(memory.getvalue())))
    _, reason = er.inspect_file(f"a.{kind}")
    mel = er.prepare_clip(f"a.{kind}", config())
    assert isinstance(reason, str)
    assert (isinstance(mel, str) and mel) or (mel.shape[1] == 64 and len(mel) and np.isfinite(mel).all())


@anything
@given(st.lists(
    st.from_regex(r"0?[0-9]{1,2}(-[0-9]{1,3}){5,7}(\.wav|\.mp3|\.txt| [(]1[)]\.wav)", fullmatch=True)
    | st.from_regex(r"03-01(-0[0-9]){4}-[0-2][0-9]\.WAV", fullmatch=True), min_size=1, max_size=8))
def test_anything_in_a_name_is_a_right_row_or_none(names):
    shutil.rmtree("any", ignore_errors=True)
    touch("any", *names)
    good = [re.fullmatch(r"03-01-(0[1-8])-0[12]-0[12]-0[12]-(\d\d)", Path(name).stem) for name in names
            if Path(name).suffix.lower() in er.AUDIO_SUFFIXES]
    expected = {match[0]: (er.EMOTIONS[int(match[1]) - 1], int(match[2])) for match in good
                if match and match[2] != "00"}
    try:
        clips, _ = er.index_clips("any")
    except er.UserError as error:
        assert not expected and "--ravdess-path" in str(error)
        return
    assert {row.clip: (row.emotion, row.actor) for row in clips.itertuples()} == expected


FLAGS = st.sampled_from([name for name in er.SETTINGS if name != "DEMO"])
WORDS = st.text(max_size=8) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(
    ["cnn,rnn", "0,1", "speaker", "random", "study", "both", "concat", "-1", "1e400", "0x10", "--demo"])


@anything
@given(st.lists(st.tuples(FLAGS, WORDS), max_size=4))
def test_anything_on_the_command_line_is_settings_or_a_sentence(flags):
    argv = [part for name, word in flags for part in (er.flag_of(name, "").split()[0], word)]
    try:
        cfg = er.parse_settings(argv)
    except er.UserError as error:
        assert str(error).count("\n") == 0 or any("\n" in word for _, word in flags)
        return
    er.check_settings(cfg)
    assert all(type(getattr(cfg, name.lower())) in (kind, int, float) for name, kind in er.SETTINGS.items())


def rows_of(content, *columns):
    """The texts of some columns of a CSV, line by line, read plainly; line 1 has none of them twice."""
    names, *rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if row]
    assert max(map(names.count, columns)) == 1
    rows = [dict(zip(names, map(str.strip, row))) for row in rows]
    return [[row.get(column, "") for column in columns] for row in rows]


BANK = "emotion,sentence\n" + "\n".join(f"{name},So {name} {i}." for name in ("sad", "odd") for i in range(6))
NONSENSE = st.binary(max_size=300) | st.text(st.sampled_from('a",;\n\r\t \0emotionsentence')).map(str.encode)


@anything
@given(NONSENSE | damaged(BANK.encode()))
def test_anything_in_a_sentence_table_is_a_bank_or_a_sentence(content):
    Path("s.csv").write_bytes(content)
    try:
        bank = er.read_sentences("s.csv", ["sad", "odd"])
    except er.UserError as error:
        assert "s.csv" in str(error) and "\n" not in str(error)
        return
    found = [[emotion, sentence] for emotion, sentences in bank.items() for sentence in sentences]
    assert sorted(found) == sorted(rows_of(content, "emotion", "sentence"))
    assert min(map(len, bank.values())) >= 5


CELLS = {  # mostly good
    "path": ["a.wav", "./a.wav", "deep\\b.wav", " c.wav ", 'so, "so".wav', "a\nb.wav", "1", "nan",
             "none.wav", "..", "x" * 300, ""],
    "emotion": ["happy", "HAPPY", " sad", "so  so", "nan", "1", "\u0130"] * 4 + ["clip", "", "\0"],
    "speaker": ["1", "2", "02", "10", "nan", "Ann  B", "\u0663", "9" * 20] * 2 + [""],
    "split": ["train", "Test", " validation"] * 6 + ["dev", ""],
    "transcript": ["So it is, yes.", "So\nit is", "nan", ""], "": ["", "1"]}
LINES = st.lists(st.fixed_dictionaries({name: st.sampled_from(cells) for name, cells in CELLS.items()}),
                 min_size=2, max_size=5, unique_by=lambda line: line["path"])


@st.composite
def tables(draw):
    """Strategy: a CSV, perhaps damaged, with some columns of CELLS and some of their cells."""
    others, text, bom = [*CELLS][2:], io.StringIO(), draw(st.sampled_from(["", "\ufeff"]))
    names = ["path", "emotion", *draw(st.lists(st.sampled_from(others), unique=True))]
    names = draw(st.sampled_from([names] * 10 + [names[1:], [*names, "emotion"]]).flatmap(st.permutations))
    writer = csv.DictWriter(text, names, extrasaction="ignore",
                            quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
                            lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])))
    writer.writeheader()
    writer.writerows(draw(LINES))
    content = (bom + text.getvalue()).encode()
    return draw(st.just(content) | damaged(content))


@anything
@given(NONSENSE | tables() | tables() | tables())
def test_anything_in_a_manifest_is_right_rows_or_a_sentence(content):
    touch(".", "a.wav", "deep/b.wav", "c.wav", 'so, "so".wav', "a\nb.wav", "1", "nan")
    Path("m.csv").write_bytes(content)
    try:
        clips, audit = er.index_manifest("m.csv")
    except er.UserError as error:
        assert "m.csv" in str(error) and "\n" not in str(error)
        return
    lines = {PureWindowsPath(path).as_posix(): line for path, *line in rows_of(
        content, "path", "emotion", "speaker", "split", "transcript")}
    assert len(lines) == audit["lines"] == len(clips) + len(audit["left_out"])
    assert not any(map(os.path.isfile, audit["left_out"]))
    for clip in clips.astype(str).to_dict("records"):
        emotion, speaker, split, transcript = lines[clip["clip"]]
        assert clip["path"] == clip["clip"] and clip["actor"] == " ".join(speaker.split())
        assert clip["emotion"] == " ".join(emotion.lower().split())
        assert clip.get("split", "") == split.lower() and clip.get("transcript", "") == transcript


@pytest.mark.parametrize("case", ONE_SENTENCE)
def test_bad_input_ends_with_one_sentence_and_nothing_lost(case, copied, monkeypatch):
    argv, named, *make_so = ONE_SENTENCE[case]
    shutil.copytree(CORPUS, "own")
    for spoil in make_so:
        spoil(monkeypatch)
    before = contents("outputs")
    common = [] if "report" in argv else [*TINY, "--bert-model", str(ENCODER)]
    with pytest.raises(er.UserError) as stop:
        er.main([*common, *argv.split()])
    message, after = str(stop.value), contents("outputs")
    assert "\n" not in message and all(words in message for words in named.split("|")), message
    assert {path: after.get(path) for path in before} == before and not Path("executed").exists()


@pytest.mark.parametrize(("argv", "named"), [("--epoch-cnn 3", "--epoch-cnn"), ("", "zenodo.org")])
def test_the_command_line_ends_with_exit_code_2_and_one_line(argv, named):
    """Without text encoder and hub: what is wrong with the corpus is said before anything else is loaded."""
    done = run_script(*argv.split())
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr


# %% The real corpus
@pytest.mark.skipif(not REAL, reason="set RAVDESS_PATH to the folder of the real corpus")
def test_real_corpus_is_complete_and_its_quiet_clips_survive():
    clips, audit = er.index_clips(START / REAL)
    sentences = er.describe_audit(clips, audit)
    assert len(clips) == 1440 and audit["left_out"] == {} and {PER_EMOTION, SAME_BYTES} <= {*sentences}
    assert "Missing from the 24 x 60 clips of RAVDESS: 0." in sentences
    paths = clips["path"][clips["actor"].isin([9, 20])]
    mels = er.in_parallel(lambda path: er.prepare_clip(path, config()), paths, "")
    assert sum(np.abs(soundfile.read(path)[0]).max() < 300 / 32768 for path in paths) >= 10
    assert [mel for mel in mels if isinstance(mel, str)] == [] and min(map(len, mels)) > 40  # 0.65 s


# %% Speed
def seconds_of(*functions):
    """The median times of functions that take turns 15 times, since machines have slow minutes."""
    times = []
    for function in functions * 15:
        time.sleep(0.2)  # threads of the one before may still be waiting for work
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return [float(np.median(times[index::len(functions)])) for index in range(len(functions))]


def recordings(count=64):
    """Files like RAVDESS's: 48 kHz, 3.7 s, of which 1.9 s are speech."""
    rng = np.random.default_rng(0)
    for i in range(count):
        speech = np.resize(er.synthesize(er.EMOTIONS[i % 8], i, rng, 48000), 91200)
        written(f"{i}.wav", np.pad(speech, (48000, 38400)), 48000)
    return [Path(f"{i}.wav") for i in range(count)]


@pytest.mark.benchmark
def test_features_take_a_fifth_of_the_time_of_librosa():
    import librosa
    cfg, paths = config(), recordings()

    def with_librosa():
        for path in paths:
            samples, rate = librosa.load(path, sr=RATE)
            librosa.feature.melspectrogram(y=samples, sr=rate)

    def with_product():
        er.in_parallel(lambda path: er.prepare_clip(path, cfg), paths, "")
    ours, theirs = seconds_of(with_product, with_librosa)
    print(f"\nfeatures: {1000 * ours / len(paths):.2f} ms a clip, librosa's loop "
          f"{1000 * theirs / len(paths):.2f} ms: {theirs / ours:.1f} times as fast")
    assert ours <= theirs / 5


@pytest.mark.benchmark
def test_training_is_several_times_as_fast_as_a_plain_loop(demo):
    import librosa
    cfg, clips, paths = demo[0], demo[1][:64].reset_index(drop=True), recordings()
    clips["mel"] = pd.Series([er.prepare_clip(path, cfg) for path in paths])
    networks = [er.build_model("cnn", demo[1], cfg, "cpu").train() for _ in range(3)]
    trainer = er.Trainer(networks[0], er.settings_for(cfg, "cnn"), 1000, "cpu")
    dataset = er.ClipDataset(clips, networks[0], cfg, "cpu", augment=True)

    class OneByOne(torch.utils.data.Dataset):
        """What a student writes: clip by clip, the same network in float32, no augmentation."""

        def __init__(self, read):
            self.read = read

        def __len__(self):
            return len(clips)

        def __getitem__(self, row):
            mel = torch.from_numpy(self.read(row)[:, :160])
            return F.pad(mel, (0, 160 - mel.shape[1]))[None], er.EMOTIONS.index(clips["emotion"][row])

    def from_file(row):
        samples, rate = librosa.load(paths[row], sr=RATE)
        mel = librosa.feature.melspectrogram(
            y=samples, sr=rate, n_fft=cfg.n_fft, hop_length=cfg.hop_length, n_mels=cfg.n_mels)
        return np.log(mel + 1e-6)

    def prepared(row):
        return np.array(clips["mel"][row], dtype=np.float32).T

    def with_product():
        for batch in er.batches_of(dataset, cfg.batch_size, shuffle=True):
            trainer.step(batch)

    def plain(network, read):
        network.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.AdamW(network.parameters())
        loader = torch.utils.data.DataLoader(OneByOne(read), cfg.batch_size, shuffle=True)

        def loop():
            for mel, label in loader:
                optimizer.zero_grad()
                F.cross_entropy(network({"mel": mel}), label).backward()
                optimizer.step()
        return loop
    ours, theirs, cached = (len(clips) / seconds for seconds in seconds_of(
        with_product, plain(networks[1], from_file), plain(networks[2], prepared)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\ntraining: {ours:.0f} augmented clips a second; plain float32 loop {theirs:.0f}: "
          f"{ours / theirs:.1f} times as fast; the same on prepared features {cached:.0f}: "
          f"{ours / cached:.1f} times; peak memory {peak:.2f} GB")
    assert ours >= 3 * theirs and peak < 2
