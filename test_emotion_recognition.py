"""Tests of emotion_recognition.py. They make their own small corpus and need no network.

    pip install -r requirements.txt -r archive/optional.txt
    python -m pytest                              everything but the speed measurements
    python -m pytest -m benchmark -n 0 -s         the speed measurements
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
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

# Before torch and transformers are imported: small models gain nothing from threads that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["https_proxy"] = "http://127.0.0.1:9"  # where nobody answers: nothing is fetched by any test

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
from hypothesis import example, given, settings
from hypothesis import strategies as st

import emotion_recognition as er

# Weights of Whisper that lie on this machine are not found: each test has a cache in its own folder.
os.environ["MPLCONFIGDIR"] = er.plt.matplotlib.get_cachedir()  # fonts are looked for once
os.environ["XDG_CACHE_HOME"] = "cache"

SCRIPT, START = Path(er.__file__), Path.cwd()
REAL = os.environ.get("RAVDESS_PATH", "")
TINY = "--device cpu --epochs-cnn 1 --epochs-rnn 1 --epochs-bert 1 --epochs-fusion 1".split()
DEMO = ["--demo", *TINY, "--fusion", "both"]
CORPUS, ENCODER, OUTPUT = Path("archive/demo/corpus"), Path("archive/demo/distilbert"), Path("outputs/demo")
SIX_ACTORS = functools.partial(er.write_demo_corpus, actors=range(1, 7))
DEMO_WHISPER = Path("archive/demo/whisper.pt")
SCORED = [name for name, system in er.SYSTEMS.items() if system.kind is not er.ensemble]  # by an evaluation
SHOWN = [name for name in SCORED if name != "speech_adapted"]  # by a single run
WORDLESS = ["cnn", "speech", "late_speech", "learned_speech"]  # who reads no words
IN_EPOCHS = [name for name in er.TRAINED if name != "speech"]  # whose head is solved at once
RATE = 16000


def config(**changes):
    """The default settings on the CPU, with changes."""
    return er.parse_settings([])._replace(device="cpu", **changes)


def touch(folder, *names):
    """Write files that differ from each other; only their names matter."""
    for path in (Path(folder, name) for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(path))


def contents(folder):
    """The bytes of all files by their paths, but for kept features, whose names are keys of their content."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".npy")
    return {str(path): path.read_bytes() for path in files}


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def figures(folder=OUTPUT, by="", split="test"):
    """The lines of metrics.json of a split, by system; of one way of grouping them."""
    lines = [line for line in read_json(Path(folder, "metrics.json")) if line["by"] == by]
    return {line["system"]: line for line in lines if line["split"] == split}


def predictions(folder=OUTPUT):
    """The table of predictions as it is read back: texts stay texts."""
    return er.read_results(folder).predictions


def scores_of(table, classes=er.EMOTIONS):
    """The figures of all rows of a table of predictions, by name."""
    return er.score(table.assign(all="rows"), classes, ["all"]).loc["rows"].to_dict()


def run_script(*argv):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=280)


def filled(tmp_path_factory, name, fill):
    """A folder in which fill(patch) has run, once in a session: all workers of pytest share it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(made)
                fill(patch)
            made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which the demo has run to its end."""
    def fill(patch):
        patch.setattr(er, "write_demo_corpus", SIX_ACTORS)
        er.main(DEMO)

    return filled(tmp_path_factory, "finished", fill)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test works in its own folder, sees no corpus of this machine, and makes small demos only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr(er, "write_demo_corpus", SIX_ACTORS)
    # The same relative path is another file in each folder.
    er.load_whisper.cache_clear()
    er.load_speech_encoder.cache_clear()


@pytest.fixture
def unpublished(monkeypatch):
    """Plots and report are left out: for tests that do not look at them."""
    monkeypatch.setattr(er, "save_figure", lambda figure, *_, **__: er.plt.close(figure))
    monkeypatch.setattr(er, "draw_plots", lambda results: None)
    monkeypatch.setattr(er, "write_report", lambda results: None)


def copy_or_link(source, target):
    """Features that are kept are never changed where they lie, and there are hundreds of them."""
    if source.endswith(".npy"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.fixture
def copied(finished, tmp_path):
    """The current folder holds a copy of the finished demo."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, copy_function=copy_or_link)


@pytest.fixture
def trained(monkeypatch):
    """The names of the systems that are trained from here on."""
    names, train = [], er.train_system
    monkeypatch.setattr(er, "train_system", lambda cfg, name, *rest: (
        names.append(name), train(cfg, name, *rest)))
    return names


@pytest.fixture(scope="session")
def corpus(finished):
    """The Corpus of the finished demo, with absolute paths."""
    return er.read_corpus(er.parse_settings(DEMO)._replace(ravdess_path=str(finished / CORPUS)))


@pytest.fixture(scope="session")
def demo(finished, corpus):
    """(settings, clips) of the finished demo, with absolute paths."""
    cfg = er.parse_settings(DEMO)
    cfg = cfg._replace(output_dir=str(finished / OUTPUT), bert_model=str(finished / ENCODER),
                       whisper_model=str(finished / DEMO_WHISPER))
    return cfg, er.add_transcripts(er.split_clips(corpus, cfg), corpus, cfg)


def listed(folder):
    """A Corpus of the names under a folder, whose files are no sound."""
    clips = er.list_ravdess(folder).drop(columns="reason")
    keys = [hashlib.sha1(Path(path).read_bytes()).hexdigest() for path in clips["path"]]
    clips = clips.assign(digest=keys).sort_values("clip", ignore_index=True)
    left_out = pd.DataFrame(columns=["path", "reason"])
    return er.Corpus("RAVDESS", str(folder), clips, left_out, "speaker", "simulated", ())


@pytest.fixture(scope="session")
def all_names(tmp_path_factory):
    """A Corpus of 1440 tiny files under the names of RAVDESS, two of them with the same bytes."""
    folder = tmp_path_factory.mktemp("names")
    codes = itertools.product(range(1, 9), (1, 2), (1, 2), (1, 2), range(1, 25))
    touch(folder, *(f"Actor_{a:02}/03-01-{e:02}-{i:02}-{s:02}-{r:02}-{a:02}.wav"
                    for e, i, s, r, a in codes if (e, i) != (1, 2)))
    for repetition in (1, 2):
        (folder / f"Actor_07/03-01-03-01-02-0{repetition}-07.wav").write_bytes(b"same")
    return listed(folder)


def batch_of(model, clips, cfg, augment=False):
    return er.ClipDataset(clips, model, cfg, "cpu", augment)[list(range(len(clips)))]


def tone(seconds, rate, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def speech(rate=RATE):
    return er.synthesize("angry", 3, np.random.default_rng(0), rate).astype(np.float32)


def written(path, samples, rate=RATE, subtype="PCM_16"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype)
    return Path(path)


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def own_corpus(emotions, speakers=(1, 2, 3, 4), takes=1, **columns):
    """Write clips and own/corpus.csv, columns as functions of (emotion, speaker, take); returns the flags."""
    columns = {"emotion": lambda emotion, *_: emotion, "speaker": lambda _, speaker, __: speaker} | columns
    rng, lines = np.random.default_rng(0), []
    for what in itertools.product(emotions, speakers, range(takes)):
        voice, actor = er.EMOTIONS[emotions.index(what[0]) % 8], speakers.index(what[1])
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


def write_sentences(path, third="happy,What a day.", last=5, emotions=er.EMOTIONS):
    """A table of five sentences an emotion, `last` for the last one, with `third` as its third line."""
    lines = [f"{emotion},Sentence {emotion} {number}" for emotion in emotions
             for number in range(last if emotion == emotions[-1] else 5)]
    Path(path).write_text("\n".join(["emotion,sentence", lines[0], third, *lines[1:]]), encoding="utf-8")


def text_of(path):
    """All text of a .docx, its tables and header too."""
    import docx
    document = docx.Document(path)
    cells = [cell.text for table in document.tables for row in table.rows for cell in row.cells]
    return "\n".join([document.sections[0].header.paragraphs[0].text, *cells,
                      *(part.text for part in document.paragraphs)])


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


def companion(path):
    """A script of archive/ as a module."""
    spec = er.importlib.util.spec_from_file_location(path.stem, path)
    module = er.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hostile:
    """Its pickle creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


PROCESSES = multiprocessing.get_context("forkserver")  # they import the script once, not each
PROCESSES.set_forkserver_preload(["emotion_recognition", "torch._dynamo"])


# %% The corpus
CLIP = "Actor_01/03-01-01-01-01-01-01.wav"
NINETY_SIX_AND_192 = [96, *[192] * 7]  # RAVDESS's clips by emotion: neutral is never strong
PER_EMOTION = ", ".join(map("{} {}".format, er.EMOTIONS, NINETY_SIX_AND_192))


@pytest.fixture(scope="session")
def few_clips(tmp_path_factory):
    """Name -> content of the clips of three actors, one an emotion."""
    folder = tmp_path_factory.mktemp("few")
    er.write_demo_corpus(folder, actors=(1, 2, 3), statements=(1,))
    paths = sorted(folder.glob("*/*.wav"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def unpacked(files, folder="corpus"):
    """Write files, given as name -> content, into a folder."""
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def data_of(*argv):
    """The sentences about the data after a run of --phase data."""
    er.main([*argv, "--phase", "data", "--device", "cpu"])
    return read_json("outputs/audit.json")["audit"]


def refusal_of(*argv):
    """The sentence with which a run of --phase data ends."""
    with pytest.raises(er.UserError) as stop:
        data_of(*argv)
    sentence = str(stop.value)
    assert "\n" not in sentence
    return sentence


def changed(corpus, **changes):
    """A copy of a Corpus, with changes."""
    return er.Corpus(**vars(corpus) | changes)


def reasons_of(left_out):
    """Path below corpus/ -> reason, of a table of files that are left out."""
    reasons = {}
    for path, reason in zip(left_out["path"], left_out["reason"], strict=True):
        below = Path(path).relative_to("corpus")
        reasons[below.as_posix()] = reason
    return reasons


def test_labels_come_from_the_name_in_code_order():
    for code in range(1, 9):
        touch("corpus", f"03-01-{code:02}-01-01-02-{10 + code}.wav")
    clips = er.list_ravdess("corpus")
    assert set(clips["reason"]) == {""}

    names = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
    assert names == er.EMOTIONS
    assert list(clips["emotion"]) == names
    assert list(clips["emotion"].cat.categories) == names
    assert list(clips["actor"]) == list(range(11, 19))
    assert list(clips["sex"]) == ["male", "female"] * 4


@pytest.mark.parametrize(("name", "expected"), [
    ("03-01-05-01-01-02-12", ["normal", 1, 2]),
    ("03-01-05-02-01-01-12", ["strong", 1, 1]),
    ("03-01-05-01-02-01-12", ["normal", 2, 1]),
])
def test_intensity_statement_and_repetition_come_from_the_name(name, expected):
    touch("corpus", f"{name}.wav")
    clips = er.list_ravdess("corpus")
    clip = clips.iloc[0]
    assert list(clip[["intensity", "statement", "repetition"]]) == expected


def test_label_encoder_keeps_the_code_order(finished):
    path = finished / OUTPUT / "label_encoder.pkl"
    encoder = pickle.loads(path.read_bytes())
    decoded = encoder.inverse_transform(range(8))
    assert list(decoded) == er.EMOTIONS


def test_a_name_that_occurs_twice_counts_once(few_clips):
    unpacked(few_clips)
    unpacked(few_clips, "corpus/deep/down")
    corpus = er.read_corpus(config(ravdess_path="corpus"))

    assert len(corpus.clips) == len(few_clips) == 24
    assert reasons_of(corpus.left_out) == {f"deep/down/{name}": "second copy" for name in few_clips}


def test_a_damaged_first_copy_does_not_hide_a_good_second_one(few_clips):
    damaged = "Actor_02/03-01-05-01-01-01-02.wav"
    unpacked(few_clips)
    unpacked({damaged: few_clips[damaged]}, "corpus/more")
    cut(Path("corpus", damaged), 500)
    corpus = er.read_corpus(config(ravdess_path="corpus"))

    reasons = reasons_of(corpus.left_out)
    assert list(reasons) == [damaged]
    assert reasons[damaged].startswith("cut off")
    assert len(corpus.clips) == 24
    assert str(Path("corpus/more", damaged)) in set(corpus.clips["path"])
    assert corpus.clips["clip"].is_monotonic_increasing  # wherever they lie


def test_links_to_folders_are_followed_and_may_lead_back():
    touch("real/Actor_01", "03-01-01-01-01-01-01.wav")
    Path("own").mkdir()
    for name, target in (("Actor_01", "real/Actor_01"), ("back", "own"), ("again", "own")):
        Path("own", name).symlink_to(Path(target).absolute())
    clips = er.list_ravdess("own")
    assert list(clips["clip"]) == ["03-01-01-01-01-01-01"]
    assert list(clips["reason"]) == [""]


def test_every_file_that_is_no_clip_is_listed_with_the_reason(few_clips, unpublished, capsys):
    unpacked(few_clips)
    unpacked({CLIP: few_clips[CLIP]}, "corpus/copy")
    reasons = {
        f"copy/{CLIP}": "second copy",
        "Actor_01/03-02-05-01-02-01-01.wav": "song",
        "Actor_01/03-02-04-01-02-01-01.wav": "song",
        "01-01-05-01-02-01-12.mp4": "video",
        "02-01-05-01-02-01-12.MP4": "video",
        "01-02-05-01-02-01-12.mp4": "video",
        "03-01-05-01-02-01-12.mp4": "video",
        "memo.wav": "other name",
        "03-03-01-01-01-01-01.wav": "a code in its name is none of RAVDESS's",
        "03-01-09-01-01-01-01.wav": "a code in its name is none of RAVDESS's",
        "03-01-02-03-01-01-01.wav": "a code in its name is none of RAVDESS's",
        "03-01-02-01-01-01-00.wav": "a code in its name is none of RAVDESS's",
        "Actor_03/03-01-05-01-01-02-03.wav": "not readable: it is empty",
    }
    touch("corpus", "notes.md", *(set(reasons) - {f"copy/{CLIP}"}))
    cut("corpus/Actor_03/03-01-05-01-01-02-03.wav", 0)
    sentences = data_of("--ravdess-path", "corpus")

    assert reasons_of(pd.read_csv("outputs/left_out.csv")) == reasons
    assert sentences[0].startswith("37 files in corpus: 24 clips of 3 actors are used; left out: ")
    for counted in ("second copy 1", "song 2", "video 4", "other name 1", "unusable 5"):
        assert counted in sentences[0]

    named = [sentence for sentence in sentences if sentence.startswith("Left out: ")]
    assert len(named) == 5
    for path in list(reasons)[-5:]:  # the unusable ones
        assert f"Left out: {Path('corpus', path)}: {reasons[path]}." in named
    assert "\n".join(sentences) in capsys.readouterr().out


@pytest.mark.parametrize("foreign", ["03-01-05-01-02-01-25", "03-01-05-01-03-01-02", "03-01-01-02-01-01-02"])
def test_a_folder_with_a_name_that_ravdess_cannot_have_is_another_corpus(foreign, few_clips, unpublished):
    unpacked(few_clips)
    unpacked({"other/03-01-05-01-02-02-01.wav": few_clips[CLIP], f"other/{foreign}.wav": few_clips[CLIP]})
    sentences = data_of("--ravdess-path", "corpus")
    assert "24 clips of 3 actors are used; left out: unusable 2" in sentences[0]
    assert "RAVDESS cannot have" in sentences[-2] and "--manifest" in sentences[-2]

    sentence = refusal_of("--ravdess-path", "corpus/other")
    assert sentence.startswith("2 clips cannot be used") and "--manifest" in sentence


def test_hidden_files_are_no_clips(few_clips, unpublished):
    unpacked(few_clips)
    touch("corpus", "._03-01-05-01-02-01-01.wav", "Actor_01/._notes.wav", ".wav")
    sentences = data_of("--ravdess-path", "corpus")
    assert "24 files in corpus: 24 clips of 3 actors are used; left out: none" in sentences[0]


def test_a_corpus_full_of_broken_clips_has_a_short_audit_and_a_long_table(few_clips, unpublished):
    unpacked(few_clips)
    touch("corpus", *(f"03-01-05-01-01-02-{actor}.wav" for actor in range(30, 60)))
    sentences = data_of("--ravdess-path", "corpus")
    assert "unusable 30" in sentences[0]
    assert 10 <= len(sentences) < 20
    assert len(pd.read_csv("outputs/left_out.csv")) == 30


def write_full_corpus(folder):
    """Write 1440 clips of 0.5 s of noise under the names of RAVDESS, two of them with the same bytes."""
    rng = np.random.default_rng(0)
    header = written("a.wav", tone(0.5, RATE)).read_bytes()[:44]
    codes = itertools.product(range(1, 9), (1, 2), (1, 2), (1, 2), range(1, 25))
    for emotion, intensity, statement, repetition, actor in codes:
        if emotion == 1 and intensity == 2:
            continue
        code = f"{emotion:02}-{intensity:02}-{statement:02}-{repetition:02}"
        samples = rng.integers(-9000, 9000, 8000, dtype=np.int16)
        name = f"Actor_{actor:02}/03-01-{code}-{actor:02}.wav"
        unpacked({name: header + samples.tobytes()}, folder)

    first = Path(folder, "Actor_07/03-01-03-01-02-01-07.wav")
    second = first.with_name("03-01-03-01-02-02-07.wav")
    second.write_bytes(first.read_bytes())


def test_the_full_corpus_is_counted_and_two_names_with_the_same_bytes_are_kept(unpublished):
    write_full_corpus("corpus")
    sentences = data_of("--ravdess-path", "corpus")
    clips = pd.read_csv("outputs/clips.csv")
    assert len(clips) == clips["clip"].nunique() == 1440

    same = "03-01-03-01-02-01-07 (happy) = 03-01-03-01-02-02-07 (happy)"
    assert "1440 clips of 24 actors are used; left out: none" in sentences[0]
    assert f"Clips per emotion: {PER_EMOTION}." in sentences
    per_actor = ", ".join(f"{actor} 60" for actor in range(1, 25))
    assert f"Clips per actor: {per_actor}." in sentences
    assert "Missing from the 1440 clips of RAVDESS: 0." in sentences
    assert any("Same bytes" in sentence and same in sentence for sentence in sentences)
    assert "test 300 clips of actors 2 5 14 15 16" in sentences[-1]
    assert pd.read_csv("outputs/left_out.csv").empty


def test_what_is_missing_is_counted_and_the_first_of_it_is_named(few_clips, unpublished):
    unpacked(few_clips)
    sentences = data_of("--ravdess-path", "corpus")
    [missing] = [sentence for sentence in sentences if sentence.startswith("Missing")]
    assert missing.startswith("Missing from the 1440 clips of RAVDESS: 1416")
    assert "03-01-01-01-01-01-04" in missing


def test_a_corpus_full_of_copies_has_a_short_audit(unpublished):
    lines = ["path,emotion,split"]
    kinds = list(itertools.product(["happy", "sad"], er.SPLITS))
    for pitch, (emotion, split) in enumerate(kinds):
        for number in range(30):
            path = written(f"{emotion}/{split}{number}.wav", tone(0.3, RATE, 200 + 20 * pitch))
            lines.append(f"{path},{emotion},{split}")
    Path("m.csv").write_text("\n".join(lines), encoding="utf-8")

    sentences = data_of("--manifest", "m.csv")
    [same] = [sentence for sentence in sentences if "Same bytes" in sentence]
    assert f"{len(kinds)} times" in same
    assert re.search(r"0\.wav \((happy|sad)\) = ", same)
    assert len(same) < 200


# %% The download
FOLDER = Path(er.RAVDESS_PATH)


def zipped(files):
    """The bytes of a zip of the files, given as name -> content."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in files.items():
            content.writestr(name, data)
    return memory.getvalue()


@pytest.fixture
def zenodo(few_clips, monkeypatch):
    """A server on this machine in place of Zenodo, with a small archive; what it does can be changed."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            it.asked += 1
            refused = "python-requests" in self.headers["User-Agent"]  # as Zenodo does
            self.send_response(403 if refused else it.status)
            self.send_header("Content-Length", len(it.content) + it.missing)
            self.end_headers()
            self.wfile.write(it.content)

        def log_message(self, *_):
            pass

    def offer(content):
        """Make these bytes the official archive."""
        it.content = content
        monkeypatch.setitem(er.ARCHIVE, "url", f"http://127.0.0.1:{server.server_port}/official.zip")
        monkeypatch.setitem(er.ARCHIVE, "md5", hashlib.md5(content).hexdigest())

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
    clips = {}
    for path in folder.rglob("*.wav"):
        name = path.relative_to(folder).as_posix()
        clips[name] = path.read_bytes()
    return clips


def everything():
    """All files, with their contents, and all folders but those above the corpus."""
    folders = {path for path in Path().rglob("*") if path.is_dir()}
    return contents("."), folders - {FOLDER.parent}


def test_download_is_all_that_a_run_needs_and_happens_once(zenodo, few_clips, unpublished, capsys):
    for again in (False, True):
        sentences = data_of("--download")
        text = capsys.readouterr()
        assert ("Nothing to download" in text.out) == again
        assert ("100%" in text.err) != again  # the bar

    assert zenodo.asked == 1
    assert list(Path("archive").iterdir()) == [FOLDER]
    assert er.find_corpus(config()) == FOLDER
    assert clips_in(FOLDER) == few_clips
    assert len(contents(FOLDER)) == len(few_clips)
    assert "24 clips of 3 actors are used" in sentences[0]


def test_download_fills_an_empty_folder_of_the_user(zenodo, few_clips):
    Path("my/own").mkdir(parents=True)
    download("--ravdess-path", "my/own/")
    assert clips_in(Path("my/own")) == few_clips
    assert list(Path("my").iterdir()) == [Path("my/own")]


@pytest.mark.parametrize("place", ["archive/elsewhere", "kagglehub/datasets/anyone"])
def test_download_finds_the_corpus_in_the_usual_places(place, zenodo, capsys):
    touch(place, CLIP)
    before = everything()
    download()
    assert zenodo.asked == 0
    assert everything() == before
    text = capsys.readouterr().out
    assert text.startswith("Nothing to download: RAVDESS clips are in ")
    assert Path(place).parts[0] in text


def test_what_the_demo_wrote_is_no_corpus(zenodo, few_clips):
    touch("archive/demo/corpus", CLIP)
    download()
    assert clips_in(FOLDER) == few_clips


def test_download_names_licence_and_citation_first(zenodo, capsys):
    zenodo.status = 404
    with pytest.raises(er.UserError):
        download()
    text = capsys.readouterr().out
    assert "CC BY-NC-SA 4.0" in text
    assert "Livingstone & Russo (2018), PLoS ONE 13(5): e0196391" in text


def test_what_an_interrupted_download_left_is_no_corpus_and_does_not_disturb(zenodo, few_clips):
    part = FOLDER.with_name(FOLDER.name + er.UNFINISHED)
    touch(part, f"clips/{CLIP}", "clips/Actor_09/03-01-01-01-01-01-09.wav", "archive.zip", "tmp123")
    for argv in ([], ["--ravdess-path", "archive"]):
        with pytest.raises(er.UserError):
            er.find_corpus(er.parse_settings(argv))

    download()
    assert clips_in(FOLDER) == few_clips
    assert list(Path("archive").iterdir()) == [FOLDER]


def test_a_download_that_is_stopped_while_it_unpacks_leaves_nothing_and_can_be_repeated(zenodo, few_clips):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, shutil, "copyfileobj", 5)  # by which zipfile writes a file
        download()
    assert everything() == ({}, set())
    download()
    assert clips_in(FOLDER) == few_clips


def test_names_in_an_archive_lead_nowhere_outside_its_folder(zenodo):
    names = ["../evil.wav", "../../../evil.wav", "Actor_01/../../evil.wav", "/evil.wav",
             r"..\evil.wav", r"C:\evil.wav", "C:evil.wav", r"\\server\share\evil.wav"]
    zenodo.offer(zipped(dict.fromkeys([CLIP, *names], b"sound")))
    with contextlib.suppress(er.UserError):  # to refuse it is as good
        download()
    outside = [path for path in Path().rglob("*evil*") if FOLDER not in path.parents]
    assert zenodo.asked == 1
    assert outside == []
    assert not Path("/evil.wav").exists()
    assert not Path("../evil.wav").exists()


@contextlib.contextmanager
def disk_of(size):
    """No file can become larger than `size`; the system says so as it does of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def spoilt(content, place):
    """The same bytes with a hundred of them, from a place on, turned over."""
    end = place + 100
    turned = bytes(255 - byte for byte in content[place:end])
    return content[:place] + turned + content[end:]


def arrives_damaged(zenodo):
    zenodo.content = spoilt(zenodo.content, place=10**5)


def breaks_off(zenodo):
    zenodo.missing = 1000


def is_gone(zenodo):
    zenodo.status = 404


def is_no_zip(zenodo):
    zenodo.offer(b"<html>Welcome</html>")


def is_half_a_zip(zenodo):
    zenodo.offer(zenodo.content[:50000])


def is_a_zip_of_other_sounds(zenodo):
    zenodo.offer(spoilt(zenodo.content, place=10**5))


def is_a_zip_of_nonsense(zenodo):
    first_sound = 30 + len(CLIP)  # after its header
    zenodo.offer(spoilt(zenodo.content, first_sound))


def lies_on_a_stopped_server(zenodo):
    zenodo.stop()


def meets_other_files(_):
    touch(FOLDER, "notes.txt")


def meets_a_file(_):
    touch(FOLDER.parent, FOLDER.name)


def meets_a_file_above(_):
    touch(".", FOLDER.parent)


def meets_a_full_disk(_):
    return disk_of(10**5)


def fills_the_disk_when_unpacked(zenodo):
    zenodo.offer(zipped({CLIP: bytes(10**6)}))
    return disk_of(10**5)


BY_HAND = "official.zip|try again|--ravdess-path"
ELSEWHERE = f"{FOLDER} cannot|make room|--ravdess-path"
FAILED_DOWNLOADS = {  # what is wrong with the archive: (what the sentence must name, how it is made so)
    "wrong md5": (f"{BY_HAND}|md5", arrives_damaged),
    "cut connection": (f"{BY_HAND}|1000 more", breaks_off),
    "not found": (f"{BY_HAND}|404", is_gone),
    "no server": (f"{BY_HAND}|refused", lies_on_a_stopped_server),
    "no zip": (f"{BY_HAND}|not a zip", is_no_zip),
    "half a zip": (f"{BY_HAND}|not a zip", is_half_a_zip),
    "wrong checksum in the zip": (f"{BY_HAND}|arrived damaged", is_a_zip_of_other_sounds),
    "nonsense in the zip": (f"{BY_HAND}|arrived damaged", is_a_zip_of_nonsense),
    "folder in use": (f"{ELSEWHERE}|not empty", meets_other_files),
    "file in the way": (f"{ELSEWHERE}|File exists", meets_a_file),
    "no folder can be made": (ELSEWHERE, meets_a_file_above),
    "full disk": (f"{ELSEWHERE}|too large", meets_a_full_disk),
    "disk full while unpacking": (f"{ELSEWHERE}|too large", fills_the_disk_when_unpacked),
}


@pytest.mark.parametrize("case", FAILED_DOWNLOADS)
def test_a_download_that_fails_ends_with_one_sentence_and_leaves_nothing(case, zenodo):
    named, make_so = FAILED_DOWNLOADS[case]
    circumstances = make_so(zenodo) or contextlib.nullcontext()
    before = everything()
    with circumstances, pytest.raises(er.UserError) as stop:
        download()

    message = str(stop.value)
    assert "\n" not in message
    for words in named.split("|"):
        assert words in message
    assert everything() == before
    needs_network = ELSEWHERE not in named or "too large" in named
    assert zenodo.asked == 0 or needs_network  # what needs none comes first


@pytest.mark.parametrize("argv", ["", "--ravdess-path nowhere"])
def test_whoever_has_no_corpus_is_told_of_download(argv):
    with pytest.raises(er.UserError, match="--download"):
        er.find_corpus(er.parse_settings(argv.split()))


def test_demo_and_download_contradict():
    with pytest.raises(er.UserError, match=r"--demo.*--download"):
        er.parse_settings(["--demo", "--download"])


# %% Splits
@pytest.mark.parametrize(("fold", "test", "validation"), [
    (0, {2, 5, 14, 15, 16}, {3, 6}),
    (1, {3, 6, 7, 13, 18}, {10, 11}),
    (2, {10, 11, 12, 19, 20}, {8, 17}),
    (3, {8, 17, 21, 23, 24}, {1, 14}),
    (4, {1, 4, 9, 22}, {2, 5}),
])
def test_folds_are_those_of_the_literature(fold, test, validation, all_names):
    clips = er.split_clips(all_names, config(folds=str(fold)))
    actors = {}
    for split, part in clips.groupby("split"):
        actors[split] = set(part["actor"])

    assert len(clips) == 1440
    assert actors["test"] == test
    assert actors["validation"] == validation
    assert actors["train"] == {*range(1, 25)} - test - validation


def clips_by(sizes):
    """Clips of actors, {actor: how many}, of the eight emotions in turn."""
    actors = np.repeat([*sizes], [*sizes.values()])
    emotions = pd.Categorical.from_codes(np.arange(len(actors)) % 8, er.EMOTIONS)
    return pd.DataFrame({"actor": actors, "emotion": emotions})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(1, 99), st.integers(8, 60), min_size=3, max_size=40))
def test_any_group_of_actors_is_split_without_overlap_and_each_tested_once(sizes):
    clips, tested = clips_by(sizes), []
    for validation, test in er.fold_actors(clips):
        chosen = {*validation, *test}
        assert len(validation) > 0
        assert len(test) > 0
        assert len(chosen) == len(validation) + len(test) < len(sizes)
        tested += [*test]
    assert sorted(tested) == sorted(sizes)
    assert str(er.fold_actors(clips)) == str(er.fold_actors(clips.copy()))


def test_speakers_of_very_different_size_are_dealt_into_folds_of_like_size():
    # Every fifth speaker would test 160 clips in the first fold and 16 in each of the others.
    sizes = {actor: 80 if actor % 5 == 1 else 8 for actor in range(101, 111)}
    sizes |= dict.fromkeys(range(111, 131), 8)
    clips = clips_by(sizes)
    tested = [sum(clips["actor"].isin(test)) for _, test in er.fold_actors(clips)]
    assert sum(tested) == len(clips)
    assert max(tested) <= 88
    assert min(tested) >= 72


def test_speakers_of_like_size_are_dealt_in_turn():
    clips = clips_by(dict.fromkeys(range(101, 113), 16))
    _, test = er.fold_actors(clips)[1]
    assert list(test) == [102, 107, 112]


@pytest.mark.parametrize("sizes", [{1: 8}, {1: 8, 2: 8}, {1: 1, 2: 1, 3: 1, 4: 1}])
def test_too_few_speakers_or_clips_have_no_folds(sizes):
    assert er.fold_actors(clips_by(sizes)) == []


def splits_of(clips):
    """The clips of a run as {split: the values of a column}."""
    return lambda column: {split: set(part[column]) for split, part in clips.groupby("split")}


@pytest.mark.parametrize("fold", range(5))
def test_a_split_by_text_tests_new_speakers_on_new_sentences_both_ways_round(fold, all_names):
    corpus, tested = changed(all_names, split="text"), []
    runs = er.runs_of(config(folds=str(fold), split="text"))
    assert [Path(run.output_dir).name for run in runs] == [
        f"fold_{fold}_seed_42_statement_{statement}" for statement in (1, 2)]
    for run, trained in zip(runs, (1, 2)):
        clips = er.split_clips(corpus, run)
        statements, actors = map(splits_of(clips), ("statement", "actor"))
        assert statements == {"train": {trained}, "validation": {3 - trained}, "test": {3 - trained}}
        assert actors["test"] == {*er.TEST_ACTORS[fold]}
        assert actors["validation"] == {*er.VALIDATION_ACTORS[fold]}
        assert sum(map(len, actors.values())) == 24
        tested += clips.query("split == 'test'")["clip"].to_list()
    # Both together test each clip of these actors once.
    everything = all_names.clips[all_names.clips["actor"].isin(er.TEST_ACTORS[fold])]
    assert sorted(tested) == sorted(everything["clip"])


def test_half_of_each_training_speaker_is_as_much_training_as_one_statement_and_has_both(all_names):
    by_text, half = (er.split_clips(changed(all_names, split=split), er.runs_of(config(split=split))[0])
                     for split in ("text", "half"))
    sizes = {split: clips.query("split == 'train'").groupby(["actor", "emotion"], observed=True).size()
             for split, clips in (("text", by_text), ("half", half))}
    assert sizes["half"].equals(sizes["text"])
    assert splits_of(half)("statement") == {split: {1, 2} for split in er.SPLITS}
    assert len(half.query("split == 'test'")) == 300  # all of them


@pytest.mark.parametrize("seed", range(3))
def test_random_split_is_stratified_and_keeps_same_bytes_together(seed, all_names):
    clips = all_names.clips.copy()
    originals = clips.loc[4::9, "digest"]
    clips.loc[::9, "digest"] = originals.to_numpy()  # 160 pairs
    corpus = changed(all_names, clips=clips, split="random")
    clips = er.split_clips(corpus, config(split="random", seed=seed))

    assert len(clips) == 1440
    splits = clips.groupby("digest")["split"].nunique()
    assert splits.max() == 1

    once = clips.drop_duplicates("digest")
    shares = pd.crosstab(once["emotion"], once["split"], normalize="index")
    assert np.allclose(shares["train"], 0.7, atol=0.015)
    assert np.allclose(shares["validation"], 0.15, atol=0.015)
    assert np.allclose(shares["test"], 0.15, atol=0.015)


def test_a_random_split_of_too_few_clips_is_refused(few_clips):
    unpacked(few_clips)
    sentence = refusal_of("--ravdess-path", "corpus", "--split", "random")
    assert "too few clips of some emotion for a random split" in sentence


@pytest.mark.parametrize(("actors", "stays"), [  # of fold 0: 1 trains, 3 validates, 2 is tested
    ([1, 3, 2], "train"),
    ([2, 3], "validation"),
    ([2, 1], "train"),
])
def test_bytes_of_several_actors_stay_in_the_first_of_train_validation_and_test(actors, stays, all_names):
    clips = all_names.clips.copy()
    for actor in actors:
        same = clips["clip"] == f"03-01-05-02-01-01-{actor:02}"
        clips.loc[same, "digest"] = "same"
    corpus = changed(all_names, clips=clips)
    split = er.split_clips(corpus, config())

    [left] = split.loc[split["digest"] == "same", "split"]
    assert left == stays
    assert len(split) == 1440 + 1 - len(actors)
    assert split.index.equals(pd.RangeIndex(len(split)))


SOUNDS = st.tuples(
    st.sampled_from(er.SPLITS),
    st.sampled_from("abcde"),
    st.sampled_from(["happy", "sad"]),
)
UNIQUE_SOUNDS = [  # so that no split lacks an emotion
    (split, f"{split} {emotion}", emotion)
    for split in er.SPLITS
    for emotion in ("happy", "sad")
]


@settings(max_examples=50, deadline=None)
@given(st.lists(SOUNDS, max_size=20))
def test_a_split_of_the_manifest_scores_nothing_that_was_trained(rows):
    rows = [*UNIQUE_SOUNDS, *rows]
    table = pd.DataFrame(rows, columns=["split", "digest", "emotion"])
    table["emotion"] = table["emotion"].astype("category")
    table = table.assign(clip=table.index, path="a.wav", actor="")
    left_out = pd.DataFrame(columns=["path", "reason"])
    corpus = er.Corpus("m.csv", "m.csv", table, left_out, "manifest", "manifest", ())
    clips = er.split_clips(corpus, config())

    first_split = {}
    for split in er.SPLITS:
        for own_split, digest, _ in rows:
            if own_split == split:
                first_split.setdefault(digest, split)
    expected = []
    for number, (split, digest, _) in enumerate(rows):
        if split == first_split[digest]:
            expected.append((number, split))
    assert list(zip(clips["clip"], clips["split"], strict=True)) == expected


def test_clips_that_leave_for_their_bytes_are_counted(unpublished):
    splits = {1: "train", 2: "validation", 3: "test", 4: "test"}
    flags = own_corpus(["happy", "sad"], split=lambda _, speaker, __: splits[speaker])
    trained, tested = "sound/004.wav", "sound/007.wav"  # sad ones, of the speakers 1 and 4
    shutil.copy(Path("own", trained), Path("own", tested))

    sentences = data_of(*flags)
    assert "1 clip left out, since their sound occurs in an earlier split" in sentences[-1]
    clips = pd.read_csv("outputs/clips.csv")
    assert trained in set(clips["clip"])
    assert tested not in set(clips["clip"])
    assert len(clips) == 7


def test_an_emotion_that_the_folder_lacks_is_named_with_the_folder(few_clips):
    others = {name: data for name, data in few_clips.items() if "/03-01-07" not in name}
    unpacked(others)
    touch("corpus", "03-02-07-01-01-01-01.wav")  # a song
    sentence = refusal_of("--ravdess-path", "corpus")
    assert sentence.startswith("no disgust clip is left for train, of 0 by 0 speakers")
    assert "corpus" in sentence and "--ravdess-path" in sentence and "--leave-out disgust" in sentence
    assert not Path("outputs/clips.csv").exists()

    audit = data_of("--ravdess-path", "corpus", "--leave-out", "disgust")
    assert "used; left out: song 1" in audit[0]


def test_emotions_that_are_left_out_are_counted_and_no_class_any_more(few_clips):
    unpacked(few_clips)
    audit = data_of("--ravdess-path", "corpus", "--leave-out", " calm, disgust,")
    assert "18 clips of 3 actors are used; left out: --leave-out 6" in audit[0]
    assert "Clips per emotion: neutral 3, happy 3, sad 3, angry 3, fearful 3, surprised 3." in audit
    assert "Missing from the 1056 clips of RAVDESS: 1038, the first 03-01-01-01-01-01-04." in audit
    assert "without calm, disgust" in read_json("outputs/audit.json")["caveats"]

    clips, left_out = pd.read_csv("outputs/clips.csv"), pd.read_csv("outputs/left_out.csv")
    assert set(clips["emotion"]) == set(er.EMOTIONS) - {"calm", "disgust"}
    assert set(left_out["reason"]) == {"--leave-out"}
    assert left_out["path"].str.contains("03-01-0[27]-").all()
    encoder = pickle.loads(Path("outputs/label_encoder.pkl").read_bytes())
    assert list(encoder.classes_) == ["neutral", "happy", "sad", "angry", "fearful", "surprised"]


def test_models_of_fewer_emotions_know_no_others_and_every_page_says_so(undrawn, capsys):
    command = [*DEMO, "--run-models", "cnn", "--leave-out", "calm,disgust"]
    er.main(command)
    table, caveat = predictions(), "without calm, disgust"
    fewer = ["neutral", "happy", "sad", "angry", "fearful", "surprised"]
    assert config_of()["classes"] == fewer == checkpoint_of("cnn")["classes"]
    assert set(table["emotion"]) == set(fewer) and "calm" not in table
    assert caveat in header_of(DOCUMENT)
    assert caveat in capsys.readouterr().out
    for name in ("predictions.csv", "histories.csv", "clips.csv"):
        written = pd.read_csv(OUTPUT / name)
        assert written["caveats"].str.contains(caveat).all()

    answer = er.Predictor(OUTPUT).predict(speech(), RATE)
    assert set(fewer) <= set(answer) and "calm" not in answer
    with pytest.raises(er.UserError, match="--leave-out=calm contradicts"):
        er.main(["--demo", "--phase", "report", "--leave-out", "calm"])
    er.main([*command, "--leave-out", "disgust, calm"])
    assert "used again" in capsys.readouterr().out
    er.main([*command, "--leave-out", "calm"])
    assert "is trained (clips changed)" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["clam", "calm,boredom", ",".join(er.EMOTIONS[1:])])
def test_emotions_that_cannot_be_left_out_are_refused(few_clips, wrong):
    unpacked(few_clips)
    sentence = refusal_of("--ravdess-path", "corpus", "--leave-out", wrong)
    assert sentence == (f"--leave-out {wrong} is not a list out of {', '.join(er.EMOTIONS)} that leaves two "
                        "and more")


def test_of_many_clips_that_cannot_be_used_ten_are_named_and_all_are_listed(few_clips):
    unpacked(few_clips)
    damaged = [f"03-01-01-01-01-02-{actor:02}.wav" for actor in range(1, 25)]
    touch("corpus/damaged", *damaged)
    audit = data_of("--ravdess-path", "corpus")
    named = [sentence for sentence in audit if sentence.startswith("Left out: ")]
    assert len(named) == 11
    assert named[-1] == "Left out: 14 more, see left_out.csv."
    assert "unusable 24" in audit[0]
    assert len(pd.read_csv("outputs/left_out.csv")) == 24


def test_leaving_out_adds_up_where_another_emotion_is_missing_too(few_clips):
    unpacked({name: data for name, data in few_clips.items() if "/03-01-07" not in name})
    sentence = refusal_of("--ravdess-path", "corpus", "--leave-out", "calm")
    assert sentence.endswith("--leave-out calm,disgust")


@pytest.mark.parametrize("folds", ["0", "3", "0,1,2,3,4"])
def test_the_emotions_to_leave_out_that_a_sentence_proposes_make_every_fold_whole(folds, unpublished):
    flags = [*own_corpus(["happy", "sad", "odd", "weird", "shy"], range(1, 8)), "--folds", folds]
    table = pd.read_csv("own/corpus.csv")
    few = {"odd": [2], "weird": [1, 5], "shy": [1, 3, 4, 7]}
    lacking = [speaker not in few.get(emotion, [speaker])
               for emotion, speaker in zip(table["emotion"], table["speaker"])]
    table[~np.array(lacking)].to_csv("own/corpus.csv", index=False)

    sentence = refusal_of(*flags)
    assert "--manifest" in sentence and "--ravdess-path" not in sentence
    assert "odd" in sentence.split("--leave-out ")[1]
    data_of(*flags, "--leave-out", sentence.split("--leave-out ")[1])


def test_settings_of_simulated_sentences_are_refused_where_a_table_has_its_own(monkeypatch):
    flags = own_corpus(["happy", "sad"], transcript=lambda emotion, *_: f"It is {emotion}.")
    sentence = refusal_of(*flags, "--sentence-noise", "0.5")
    assert "for simulated sentences, which corpus.csv does not use: leave them out" in sentence
    monkeypatch.setattr(er, "SENTENCE_NOISE", 0.5)
    assert refusal_of(*flags) == sentence


@pytest.mark.parametrize("split", ["text", "half", "random"])
def test_a_constant_that_contradicts_the_splits_of_a_table_is_refused_like_a_flag(split, monkeypatch):
    flags = own_corpus(["happy", "sad"], split=lambda _, speaker, __: "train" if speaker < 3 else "test")
    monkeypatch.setattr(er, "SPLIT", split)
    assert "corpus.csv has a column split: leave out --folds, --runs and --split" in refusal_of(*flags)


def test_one_missing_actor_of_ravdess_moves_no_other_one_to_another_fold():
    for missing in range(1, 25):
        clips = clips_by({actor: 8 for actor in range(1, 25) if actor != missing})
        assert er.fold_actors(clips) == [*zip(er.VALIDATION_ACTORS, er.TEST_ACTORS)]


def test_bytes_in_two_splits_of_a_manifest_stay_in_the_first_and_that_is_said(unpublished):
    flags = own_corpus(["happy", "sad"], split=lambda _, speaker, __: {3: "validation", 4: "test"}.get(
        speaker, "train"))
    copied_from, copied_to = Path("own/sound/000.wav"), Path("own/sound/003.wav")  # happy, speakers 1 and 4
    written("own/sound/more.wav", speech())
    with Path("own/corpus.csv").open("a") as table:
        table.write("sound/more.wav,happy,4,test\n")
    copied_to.write_bytes(copied_from.read_bytes())
    audit = data_of(*flags)
    assert "1 clip left out, since their sound occurs in an earlier split" in audit[-1]
    clips = pd.read_csv("outputs/clips.csv").set_index("clip")["split"]
    assert "sound/003.wav" not in clips
    assert clips["sound/000.wav"] == "train"


def test_unreadable_files_are_counted_before_a_class_that_is_missing_in_a_split(few_clips):
    unpacked(few_clips)
    cut("corpus/Actor_01/03-01-07-01-01-01-01.wav", 500)  # of the test actor
    touch("corpus", "03-02-07-01-01-01-01.wav", "memo.wav", "03-01-05-01-01-02-03.wav")
    sentence = refusal_of("--ravdess-path", "corpus")

    unreadable, missing = sentence.split("; ")
    assert unreadable.startswith("2 clips cannot be used (the first, corpus")
    first = Path("corpus/Actor_02/03-01-07-01-01-01-02.wav")
    assert missing.startswith(f"no disgust clip is left for test, of 2 by 2 speakers (the first: {first}): ")
    assert "--folds" in missing and "--leave-out disgust" in missing


def test_files_that_a_manifest_names_in_vain_are_counted_before_a_class_that_is_missing():
    flags = own_corpus(["happy", "sad"])
    first, second = Path("own/sound/004.wav"), Path("own/sound/005.wav")  # sad ones, of the speakers 1 and 2
    first.unlink()
    second.unlink()
    sentence = refusal_of(*flags)

    unreadable, missing = sentence.split("; ")
    assert unreadable.startswith(f"2 clips cannot be used (the first, {first}: it does not exist")
    assert "no sad clip is left for" in missing
    assert "--manifest" in missing


def test_a_manifest_none_of_whose_files_are_there_names_the_first_that_was_tried():
    flags = own_corpus(["happy", "sad"])
    shutil.rmtree("own/sound")
    sentence = refusal_of(*flags)
    first = Path("own/sound/000.wav")
    assert sentence.startswith(f"8 clips cannot be used (the first, {first}: it does not exist")
    assert "; own/corpus.csv has no clip that can be used: " in sentence


def test_unreadable_files_are_counted_where_no_clip_of_an_emotion_can_be_read(few_clips):
    unpacked(few_clips)
    broken = sorted(Path("corpus").rglob("03-01-07*"))
    for path in broken:
        cut(path, 500)
    sentence = refusal_of("--ravdess-path", "corpus")
    assert "disgust" in sentence
    assert "3 clips cannot be used" in sentence
    assert str(broken[0]) in sentence


# %% Sentences
def words_of(sentences):
    """All words of some sentences, in lower case, in order."""
    text = " ".join(sentences)
    return re.findall(r"[\w']+", text.lower())


def test_bank_holds_thirty_different_sentences_per_emotion_that_do_not_name_it():
    bank = er.sentence_bank()
    assert list(bank) == er.EMOTIONS
    every = set()
    for emotion, sentences in bank.items():
        assert len(sentences) == 30
        assert emotion not in words_of(sentences)
        every.update(map(str.lower, sentences))
    assert len(every) == 240


@pytest.mark.parametrize("fold", range(5))
def test_folds_share_no_sentence_but_the_words_of_their_sentences(fold):
    trained, tested = [], []
    for sentences in er.sentence_bank().values():
        train = er.sentences_of(sentences, "train", fold)
        validation = er.sentences_of(sentences, "validation", fold)
        test = er.sentences_of(sentences, "test", fold)
        following = (fold + 1) % 5
        assert test == sentences[fold::5]
        assert validation == sentences[following::5]
        assert sorted(train + validation + test) == sorted(sentences)
        trained += words_of(train)
        tested += words_of(test)

    known = np.isin(tested, trained)
    assert known.mean() >= 0.9


@pytest.mark.parametrize("split", ["speaker", "random"])
def test_sentences_are_drawn_reproducibly_and_stay_in_their_split(split, all_names):
    corpus = changed(all_names, split=split)
    cfg = config(split=split, folds="3")
    clips = er.split_clips(corpus, cfg)
    half = clips.sample(frac=0.5, random_state=0)
    drawn = er.add_transcripts(clips, corpus, cfg)["transcript"]
    again = er.add_transcripts(half.reset_index(), corpus, cfg)["transcript"]
    other = er.add_transcripts(clips, corpus, cfg._replace(seed=7))["transcript"]

    differ = drawn != other
    assert list(again) == list(drawn[half.index])  # whatever clips stand beside them
    assert drawn.nunique() > 230
    assert differ.mean() > 0.7
    bank = er.sentence_bank()
    for emotion, part, sentence in zip(clips["emotion"], clips["split"], drawn, strict=True):
        assert sentence in er.sentences_of(bank[emotion], part, 3)


def test_the_transcripts_are_left_by_clip_for_the_users_own_code(finished):
    folder = finished / OUTPUT
    pickled = Path(folder, "ravdess_transcripts_simulated.pkl").read_bytes()
    clips = pd.read_csv(folder / "clips.csv", index_col="clip")
    assert len(clips) == 96
    assert pickle.loads(pickled) == clips["transcript"].to_dict()


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 1.0])
def test_noise_deals_exactly_its_share_of_sentences_anew_within_each_split(noise, all_names):
    clips = er.split_clips(all_names, config()).astype({"emotion": str})
    cfg = config(sentence_noise=noise)
    dealt = er.deal_emotions(clips, cfg)
    again = er.deal_emotions(clips, cfg)
    assert list(again) == list(dealt)

    for split in er.SPLITS:
        rows = clips["split"] == split
        before, after = clips.loc[rows, "emotion"], dealt[rows]
        assert sorted(after) == sorted(before)  # a permutation
        size = len(before)
        others = (after != before).sum()
        assert others <= round(noise * size)
        assert others == pytest.approx(noise * size * 7 / 8, abs=0.06 * size)


def test_at_full_noise_sentences_are_independent_of_the_emotion(all_names):
    from sklearn.metrics import normalized_mutual_info_score
    clips = er.split_clips(all_names, config())
    half = er.deal_emotions(clips, config(sentence_noise=0.5))
    full = er.deal_emotions(clips, config(sentence_noise=1.0))
    assert normalized_mutual_info_score(clips["emotion"], half) > 0.1
    assert normalized_mutual_info_score(clips["emotion"], full) < 0.02


def test_noise_is_marked_and_counted(finished, unpublished):
    sentences = data_of("--ravdess-path", str(finished / CORPUS), "--sentence-noise", "0.5")
    caveats = read_json("outputs/audit.json")["caveats"]
    assert caveats == ["text: simulated sentences (oracle, noise 0.5)"]

    clips = pd.read_csv("outputs/clips.csv")
    differ = clips["emotion"] != clips["sentence_emotion"]
    share = differ.mean()
    assert 0.3 < share < 0.5
    assert f"{share:.1%} of the clips with a sentence of another emotion (50.0% dealt anew)" in sentences[-1]


@pytest.mark.parametrize("fold", range(5))
def test_sentences_of_the_user_are_drawn_and_cross_no_split(fold, all_names):
    write_sentences("own.csv")
    cfg = config(sentences_csv="own.csv", folds=str(fold))
    clips = er.split_clips(all_names, cfg)
    clips = er.add_transcripts(clips, all_names, cfg)
    splits = clips.groupby("transcript")["split"].nunique()
    assert splits.max() == 1

    bank = er.sentence_bank("own.csv")
    assert "What a day." in bank["happy"]
    for emotion, sentence in zip(clips["emotion"], clips["transcript"], strict=True):
        assert sentence in bank[emotion]


def test_vocabulary_is_of_the_training_split_only(demo):
    cfg, clips = demo
    checkpoint = er.read_checkpoint(cfg, "rnn")
    model = er.restore(checkpoint)
    is_trained = clips["split"] == "train"
    trained, others = clips[is_trained], clips[~is_trained]
    known = set(words_of(trained["transcript"]))
    unknown = set(words_of(others["transcript"])) - known
    assert unknown
    assert model.spec["vocabulary"] == ["<pad>", "<unk>", *sorted(known)]

    tokens = model.tokenize([min(unknown), "xylophone", ""])["tokens"]
    assert tokens.tolist() == [[1], [1], [1]]


# %% Sound
def log_mels_of(samples, rate=RATE, **changes):
    """The log-mels (T, M) of samples, as numbers that can be subtracted."""
    return er.load_clip(samples, config(**changes), rate).mel.astype(float)


def parted(*parts, rate=RATE):
    """Parts one after the other: samples, or seconds of faint noise."""
    rng = np.random.default_rng(0)
    faint = functools.partial(rng.normal, 0, 1e-5)
    arrays = [part if isinstance(part, np.ndarray) else faint(int(part * rate)) for part in parts]
    return np.concatenate(arrays).astype(np.float32)


def bang(seconds=0.05):
    """Noise as loud as can be that ends at once."""
    return np.random.default_rng(0).uniform(-1, 1, int(seconds * RATE)).astype(np.float32)


def test_silent_ends_are_cut():
    clip = er.load_clip(parted(1.0, speech(), 2.0), config(), RATE)
    inside = er.load_clip(speech(), config(), RATE)
    assert clip.seconds[0] == pytest.approx(1 + inside.seconds[0], abs=0.02)
    assert abs(len(clip.mel) - len(inside.mel)) <= 1
    assert len(clip.samples) == 256 * len(clip.mel)

    patient = er.load_clip(parted(1.0, speech(), 2.0), config(trim_db=1e6), RATE)
    assert patient.seconds[0] == 0
    assert len(patient.mel) == 1 + (3 * RATE + len(speech())) // 256


@pytest.mark.parametrize("gain", [1e-3, 0.03, 0.5, 10, 32768])
def test_any_gain_is_heard_alike(gain):
    assert np.abs(log_mels_of(speech() * gain) - log_mels_of(speech())).max() < 0.02


INTEGERS = (0.5 * speech() * 32768).astype(np.int16)


@pytest.mark.parametrize("recording", [
    INTEGERS.tolist(),
    INTEGERS.astype(np.int32),
    INTEGERS.astype(np.int64),
    INTEGERS.astype(np.int32) * 65536,
    INTEGERS.astype(np.int32) * 256,
    (INTEGERS.astype(int) + 32768).astype(np.uint16),
    INTEGERS / 32768,
    torch.tensor(INTEGERS / 32768, requires_grad=True),
    (INTEGERS, RATE),
    (RATE, INTEGERS[:, None]),
    (torch.tensor(INTEGERS / 32768)[None], RATE),
], ids="list 32 64 full 24 unsigned float tensor librosa gradio torchaudio".split())
def test_numbers_of_every_kind_are_heard_alike(recording):
    rate = RATE * (not isinstance(recording, tuple))
    assert np.abs(log_mels_of(recording, rate) - log_mels_of(INTEGERS)).max() < 0.02


@pytest.mark.parametrize(("recording", "rate"), [
    (None, RATE), ([[1, 2], [3]], RATE), ("a b".split(), RATE), (np.zeros((2, 3, 4)), RATE), (np.zeros(9), 0),
    (np.zeros(9), "16 kHz"), (np.zeros(9), 1), (np.zeros(9), 2e9), (np.zeros(9), math.nan),
    (np.zeros(9, complex), RATE), (np.zeros(9, bool), RATE), ({}, RATE),
])
def test_what_is_no_recording_is_one_sentence(recording, rate):
    with pytest.raises(er.UserError, match=r"a recording is a path, or an array|too short"):
        er.load_clip(recording, config(), rate)


@pytest.mark.parametrize("noise", [
    0.3,
    0.3 * np.sin(2 * np.pi * 30 * np.arange(len(speech())) / RATE),
    0.1 * np.sin(2 * np.pi * 50 * np.arange(len(speech())) / RATE + 1),
    0.1 * np.sin(2 * np.pi * 60 * np.arange(len(speech())) / RATE + 1),
], ids=["offset", "rumble", "hum of 50 Hz", "hum of 60 Hz"])
def test_what_nobody_hears_changes_nothing(noise):
    clean, noisy = log_mels_of(speech()), log_mels_of(speech() + noise)
    assert len(noisy) == pytest.approx(len(clean), abs=2)
    middle = slice(20, 60)
    assert np.abs(noisy[middle, 4:] - clean[middle, 4:]).mean() < 0.1


@pytest.mark.parametrize("samples", [
    parted(1.0, np.array([0.95]), 1.0, 0.03 * speech(), 1.0),
    parted(1.0, 0.1 * bang(), 1.0, 0.03 * speech(), 1.0),
    parted(1.0, 0.03 * speech(), 1.0, 0.1 * bang(), 1.0),
], ids=["one sample", "a bang before", "a bang after"])
def test_a_thump_is_no_speech_and_hides_none(samples):
    mel = log_mels_of(samples)
    expected = log_mels_of(speech())
    assert len(mel) == pytest.approx(len(expected), abs=2)
    assert mel[30:60].mean() == pytest.approx(expected[30:60].mean(), abs=0.3)


def test_a_bang_in_a_long_recording_silences_no_window():
    cfg, words = config(), [0.03 * speech()] * 20
    clip = er.load_clip(np.concatenate([*words, bang(), *words]), cfg, RATE)
    table = pd.DataFrame({"mel": [clip.mel], "samples": [clip.samples], "seconds": [clip.seconds]})
    assert (er.windows_of(table, cfg)["voiced"] > 0.5).all()


def test_loud_and_quiet_speakers_in_turns_are_both_heard():
    turn = np.tile(speech(), 3)
    cfg, quiet = config(), turn * 10 ** (-26 / 20)
    clip = er.load_clip(parted(turn, 0.3, quiet, 0.3, turn, 0.3, quiet), cfg, RATE)
    table = pd.DataFrame({"mel": [clip.mel], "samples": [clip.samples], "seconds": [clip.seconds]})
    windows = er.windows_of(table, cfg)
    assert (windows["voiced"] > 0.5).all()
    assert windows["end"].max() == pytest.approx(len(np.tile(turn, 4)) / RATE + 0.9, abs=0.3)


@pytest.mark.parametrize("pause", [1.0, 3.0, 20.0])
def test_long_pauses_are_cut_and_times_are_those_of_the_recording(pause):
    cfg = config()
    short = er.load_clip(parted(speech(), 0.25, speech()), cfg, RATE)
    clip = er.load_clip(parted(speech(), pause, speech()), cfg, RATE)
    assert len(clip.mel) == pytest.approx(len(short.mel), abs=14)
    assert clip.seconds[-1] - short.seconds[-1] == pytest.approx(pause - 0.25, abs=0.05)


VOICE = speech() + np.random.default_rng(0).normal(0, 0.01, len(speech())).astype(np.float32)
CHANNELS = {  # what two channels are: (them, what is said)
    "the same": ((VOICE, VOICE), ""),
    "one off": ((VOICE, 0 * VOICE), ""),
    "inverted": ((VOICE, -VOICE), "channels that cancel each other"),
    "different": ((VOICE, np.roll(VOICE, 3000)), "2 different channels were mixed: --channel 1"),
}


@pytest.mark.parametrize(("channels", "note"), CHANNELS.values(), ids=CHANNELS)
def test_channels_are_mixed_and_said_where_they_differ(channels, note):
    stack = np.stack(channels)
    clip = er.load_clip(stack, config(), RATE)
    assert clip.note.startswith(note)
    assert bool(clip.note) == bool(note)
    first = er.load_clip(stack.T, config(channel=1), RATE)
    assert first.note == ""
    assert np.array_equal(clip.mel, first.mel) == ("different" not in note)
    with pytest.raises(er.AudioError, match="--channel 3: it has 2 channels"):
        er.load_clip(stack, config(channel=3), RATE)


def test_a_narrow_band_is_said():
    wide = speech(48000) + np.random.default_rng(0).normal(0, 0.01, len(speech(48000)))
    narrow = er.soxr.resample(wide, 48000, 8000)
    assert er.load_clip(narrow, config(), 8000).note == "no sound above 4 kHz: less sure"
    assert er.load_clip(wide, config(), 48000).note == ""
    assert er.load_clip(narrow, config(sampling_rate=8000), 8000).note == ""


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_any_sampling_rate_is_resampled(rate):
    path = written("tone.wav", tone(1.5, rate), rate)
    samples, note = er.load_samples(path, config())
    assert samples.dtype == np.float32
    assert note == ""
    assert len(samples) == pytest.approx(24000, abs=2)

    inside = slice(2000, 22000)
    expected = tone(1.5, RATE)
    gaps = np.abs(samples[inside] - expected[inside])
    assert gaps.max() < 0.01


def test_mel_power_is_that_of_torchaudio():
    import torchaudio
    cfg, samples = config(), speech()
    transform = torchaudio.transforms.MelSpectrogram(
        RATE,
        cfg.n_fft,
        hop_length=cfg.hop_length,
        f_min=50.0,
        f_max=8000.0,
        n_mels=cfg.n_mels,
        center=True,
        pad_mode="constant")
    expected = transform(torch.from_numpy(samples)).T.numpy()
    power = er.mel_power(samples, cfg)
    assert power.dtype == np.float32
    assert power.shape == (1 + len(samples) // cfg.hop_length, cfg.n_mels)
    assert np.allclose(power, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("samples", "reason"), [
    (np.zeros(RATE), "silent"),
    (np.random.default_rng(0).integers(-1, 2, 3 * RATE).astype(np.int16), "silent"),
    (np.random.default_rng(0).normal(0.1, 3e-5, 3 * RATE), "silent"),
    (parted(1.0, np.array([0.9]), 1.0), "silent"),
    (speech()[:1000], "too short: 0.06 s"),
    (speech()[:0], "no samples in it"),
    (speech() * np.nan, "NaN, infinite or huge samples"),
], ids=["zeros", "rounding", "offset", "click", "short", "nothing", "NaN"])
def test_where_nothing_is_heard_the_reason_is_its_own(samples, reason):
    with pytest.raises(er.AudioError, match=reason):
        er.load_clip(samples, config(), RATE)


@pytest.mark.parametrize(("span", "there"), [
    ((1.5, 4.0), True), ((2, 1), False), ((9, 12), False), ((0.5, 9), False)])
def test_a_segment_is_read_alone_or_named(span, there):
    samples = parted(1.5, speech(), 1.5)
    path = written("a.wav", samples)
    if not there:
        with pytest.raises(er.AudioError, match=f"segment from {span[0]} to {span[1]} s does not lie in its"):
            er.load_clip(path, config(), span=span)
        return
    segment = er.load_clip(path, config(), span=span)
    array = er.load_clip(samples[24000:64000], config(), RATE)
    assert np.abs(segment.mel.astype(float) - array.mel).max() < 0.2


def test_a_segment_of_an_mp3_begins_as_the_file_has_it():
    path, samples = Path("a.mp3"), er.soxr.resample(np.tile(speech(), 4), RATE, 44100)
    soundfile.write(path, samples, 44100, "MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.99)
    ((whole, rate),) = er.sound_parts(path)
    ((part, _),) = er.sound_parts(path, span=(1.3, 3.0))
    assert np.abs(part - whole[round(1.3 * rate):3 * rate]).max() < 1e-6


def test_what_librosa_alone_can_read_has_segments_and_channels_too(monkeypatch):
    import librosa
    channels = np.stack([parted(1.5, speech(), 1.5), parted(1.5, np.roll(speech(), 3000), 1.5)])
    monkeypatch.setattr(librosa, "load", lambda path, sr, mono: (channels, RATE))
    Path("a.m4a").write_text("what ffmpeg would read")
    for channel in (0, 2):
        cfg = config(channel=channel)
        segment = er.load_clip("a.m4a", cfg, span=(1.5, 4.0))
        array = er.load_clip(channels[:, 24000:64000], cfg, RATE)
        assert np.array_equal(segment.mel, array.mel)
        assert segment.note == array.note
    with pytest.raises(er.AudioError, match="segment from 9 to 12 s does not lie in its"):
        er.load_clip("a.m4a", config(), span=(9, 12))


FORMATS = {  # ending and subtype: sampling rate
    "wav GSM610": 8000, "wav ULAW": 8000, "wav IMA_ADPCM": RATE, "wav DOUBLE": RATE, "w64 PCM_16": RATE,
    "flac PCM_24": RATE, "ogg VORBIS": RATE, "opus OPUS": RATE, "mp3 MPEG_LAYER_III": RATE,
    "aiff PCM_16": RATE, "au PCM_16": RATE, "caf PCM_16": RATE}


@pytest.mark.parametrize(("name", "rate"), FORMATS.items(), ids=FORMATS)
def test_every_format_is_read_to_its_end_or_is_said_to_be_cut_off(name, rate):
    ending, subtype = name.split()
    path, samples = Path(f"a.{ending}"), speech(rate)
    kind = {"opus": "OGG"}.get(ending, ending.upper())
    soundfile.write(path, samples, rate, subtype, format=kind)
    whole = er.load_clip(path, config())
    length = len(er.load_clip(samples, config(), rate).mel)
    assert len(whole.mel) == pytest.approx(length, abs=5)
    for share in (0.9, 0.5, 0.1):
        cut(path, int(share * path.stat().st_size))
        with pytest.raises(er.AudioError, match=r"cut off|not readable"):
            er.load_clip(path, config())


def test_an_ogg_file_whose_recorder_marks_no_end_is_read():
    soundfile.write("a.ogg", speech(), RATE, "VORBIS", format="OGG")
    content = bytearray(Path("a.ogg").read_bytes())
    last = content.rindex(b"OggS")
    content[last + 5] &= 3  # the mark
    content[last + 22:last + 26] = bytes(4)
    content[last + 22:last + 26] = ogg_checksum(content[last:]).to_bytes(4, "little")
    Path("b.ogg").write_bytes(content)
    whole, unmarked = (er.load_clip(path, config()).mel for path in ("a.ogg", "b.ogg"))
    assert np.array_equal(whole, unmarked)


def ogg_checksum(page):
    """The checksum of a page of Ogg whose own four bytes are zero."""
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x04C11DB7 * (register >> 31 & 1))
        register &= 0xFFFFFFFF
    return register


def with_sizes(riff, data):
    """A WAV file whose header says these sizes; "" stands for the true one."""
    path = written("a.wav", speech())
    content = bytearray(path.read_bytes())
    for place, size in ((4, riff), (40, data)):
        if size != "":
            content[place:place + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("sizes", [
    (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (36, 0), ("", 0), ("", 0xFFFFFFFF)], ids=str)
def test_lengths_that_a_recorder_never_filled_in_mean_to_the_end(sizes):
    expected = er.load_clip(written("b.wav", speech()), config())
    assert np.array_equal(er.load_clip(with_sizes(*sizes), config()).mel, expected.mel)


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_a_sampling_rate_that_cannot_be_is_said(rate):
    path = written("a.wav", speech())
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(er.AudioError, match=f"its header says {rate} Hz"):
        er.load_clip(path, config())


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 72862\n"


@pytest.mark.parametrize(("path", "content", "reason"), [
    ("https://example.org/a.wav", None, "address of the web: download it"),
    ("c:/a.wav", None, "it does not exist"),
    ("nowhere.wav", None, "does not exist"),
    (".", None, "is a folder"),
    ("a.wav", "", "it is empty"),
    ("a.wav", LFS, "pointer of Git LFS .* git lfs pull"),
    ("a.wav", "no sound", r"not readable \(Format not recognised\)$"),
    ("a.mp3", "no sound", r"not readable \(Format not recognised\)$"),
    ("a.raw", "no sound", "not readable as audio, and ffmpeg"),
    ("a.m4a", "no sound", "not readable as audio, and ffmpeg"),
])
def test_each_file_that_cannot_be_read_has_its_own_sentence(path, content, reason, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if content is not None:
        Path(path).write_text(content)
    with pytest.raises(er.AudioError, match=reason):
        er.load_clip(path, config())


def ramp(frames):
    """A log-mel (T, M) each of whose frames is filled with its number."""
    numbers = np.arange(frames, dtype=np.float16)
    return np.tile(numbers[:, None], (1, 64))


def windows_heard(mels, demo, view=(1.0, 1.0)):
    """The log-mel windows (B, M, T) that AudioCNN is given of log-mels (T, M) in a view: speed, tempo."""
    cfg, clips = demo
    rows = list(range(len(mels)))
    clips = clips.loc[rows].assign(mel=pd.Series(mels))
    dataset = er.ClipDataset(clips, er.AudioCNN, cfg, "cpu")
    dataset.view = view
    batch = dataset[rows]
    return batch["mel"][:, 0]


def loudest(pitch, speed, demo):
    """The band that is loudest when a tone is heard at a speed."""
    mel = np.log(er.mel_power(tone(4, RATE, pitch), demo[0]) + 1e-6).astype(np.float16)
    [window] = windows_heard([mel], demo, (speed, 1.0))
    return int(window.mean(dim=1).argmax())


def test_a_faster_voice_is_heard_higher(demo):
    slow = loudest(1000, 1.0, demo)
    fast = loudest(1000, 1.19, demo)
    high = loudest(1190, 1.0, demo)
    assert fast >= slow + 2
    assert high - 1 <= fast <= high + 1


def test_a_higher_tempo_reads_more_of_a_clip_at_the_same_pitch(demo):
    [window] = windows_heard([ramp(400)], demo, (1.0, 1.25))
    band = window[5]
    steps = band.diff()
    assert steps.min() == pytest.approx(1.25, abs=0.01)
    assert steps.max() == pytest.approx(1.25, abs=0.01)
    assert band.mean() == pytest.approx(199.5, abs=1.5)  # the middle of the clip


def test_a_short_clip_is_repeated_at_its_ends_and_a_long_one_cut_in_the_middle(demo):
    windows = windows_heard([ramp(119), ramp(200)], demo)  # of 160 frames
    short, long = windows[:, 5].tolist()
    assert long == list(range(20, 180))
    assert short[:21] == [0] * 21
    assert short[21:140] == list(range(119))
    assert short[140:] == [118] * 20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000))
def test_windows_cover_a_clip_whole_and_overlap_by_half(frames):
    cfg = config()
    mel, samples = ramp(frames) / 100, np.arange(frames * cfg.hop_length)
    second = RATE / cfg.hop_length
    seconds = np.arange(frames) / second
    clips = pd.DataFrame({"clip": ["a"], "mel": [mel], "samples": [samples], "seconds": [seconds]})
    windows = er.windows_of(clips, cfg)
    starts = (windows["start"] * second).round().astype(int)
    ends = (windows["end"] * second).round().astype(int)
    for start, end, found, heard in zip(starts, ends, windows["mel"], windows["samples"]):
        assert np.array_equal(found, mel[start:end])
        assert np.array_equal(heard, samples[start * cfg.hop_length:end * cfg.hop_length])
    assert starts.iloc[0] == 0
    assert ends.iloc[-1] == frames

    if frames <= 6 * second + 1:
        assert len(windows) == 1
        return
    assert set(ends - starts) == {160}
    *gaps, last = np.diff(starts)
    assert set(gaps) <= {80}
    assert 0 < last <= 80


def test_a_window_says_how_much_voice_is_in_it():
    mel = np.full((640, 64), -9.0, np.float32)
    mel[:160] = 0  # 2.56 of 10.24 s
    clips = pd.DataFrame({"mel": [mel], "samples": [np.zeros(10 * RATE)], "seconds": [np.arange(640) / 62.5]})
    windows = er.windows_of(clips, config())
    assert windows["voiced"].tolist() == [1, 0.5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bands", [16, 64])
def test_half_of_the_training_windows_are_in_noise_and_a_quarter_lack_upper_bands(bands):
    torch.manual_seed(0)
    loud, silent = (er.disturb(torch.full((4000, 1, bands, 4), level)) for level in (0.0, -40.0))
    noise = silent.mean(dim=(1, 3)) * 10 / np.log(10)  # (B, M) in dB of loud speech
    noisy, narrow = noise[:, bands // 2] > -90, loud[:, 0, -1].amax(dim=1) < -1
    assert float(noisy.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(narrow.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(noise[noisy].max()) < -25 + 8 + 6  # its level, its slope and how it wavers
    assert float(noise[noisy, bands // 2].min()) == pytest.approx(-70, abs=6)
    # What is left is left as it was, below 3 kHz always.
    low = loud[:, :, :bands // 2]
    assert float(low.min()) >= 0
    assert float(low.median()) == pytest.approx(0, abs=0.01)


def uneven_clips(*sizes):
    """Clips of as many emotions as there are sizes, all training."""
    emotions = pd.Categorical.from_codes(np.repeat(range(len(sizes)), sizes), er.EMOTIONS[:len(sizes)])
    return pd.DataFrame({"emotion": emotions, "split": "train"})


@pytest.mark.parametrize(("sizes", "flags", "weights"), [
    (NINETY_SIX_AND_192, [], [1] * 8),
    ([29, 10], [], [1, 1]),
    ([336, 24, 12], [], [1, 14**0.5, 28**0.5]),
    ([30, 10], [], [1, 3**0.5]),
    ([336, 24, 12], ["--no-class-weights"], [1, 1, 1])])
def test_rare_emotions_count_more_from_three_to_one_on(sizes, flags, weights):
    targets = er.class_targets(uneven_clips(*sizes), er.parse_settings(flags))
    assert torch.allclose(targets, torch.tensor(weights).float().diag())


@pytest.mark.parametrize("kind", [er.AudioCNN, er.TextRNN])
def test_labels_of_an_uneven_corpus_are_weighted_in_training(kind, demo):
    cfg, clips = demo
    kept = pd.concat([clips[clips["emotion"] == "sad"], clips[clips["emotion"] == "calm"][:2]])
    kept = kept.assign(split="train", emotion=kept["emotion"].cat.remove_unused_categories())
    model = kind.start({"classes": 2, "dropout": 0.4}, kept, cfg, {})
    label = batch_of(model, kept, cfg._replace(mixup=0.0), augment=True)["label"]
    calm, sad = label.unique(dim=0).sum(dim=0).tolist()
    assert calm == pytest.approx((sum(kept["emotion"] == "sad") / 2)**0.5)
    assert sad == 1
    even = cfg._replace(mixup=0.0, class_weights=False)
    assert batch_of(model, kept, even, augment=True)["label"].ndim == 1


@pytest.mark.parametrize(("emotion", "said"), [
    ("开心", True), ("ดีใจ", True), ("खुश", True), ("fröhlich", False)])
def test_names_in_another_script_get_one_sentence_about_fonts_and_no_warning(emotion, said, recwarn, capfd):
    audit = data_of(*own_corpus([emotion, "sad"]))
    assert sum("install" in sentence for sentence in audit) == said
    assert sum("Noto Sans CJK" in sentence for sentence in audit) == said
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert "findfont" not in capfd.readouterr().err


def test_fonts_that_have_what_the_usual_one_lacks_are_used_beside_it(monkeypatch):
    monkeypatch.setitem(er.plt.rcParams, "font.family", ["sans-serif"])
    monkeypatch.setattr(er, "FONTS", "No such font,STIXGeneral")  # the latter comes with matplotlib
    flags = own_corpus(["happy", "sad"])
    for _ in range(2):  # once more: no name twice
        data_of(*flags)
        assert er.plt.rcParams["font.family"] == ["sans-serif", "STIXGeneral"]


@pytest.mark.parametrize(("flags", "said"), [([], True), (["--no-class-weights"], False)])
def test_the_audit_says_that_the_loss_is_weighted_by_class(flags, said, unpublished):
    corpus = own_corpus(["happy", "sad"], takes=4)
    table = pd.read_csv("own/corpus.csv")
    rare = table[table["emotion"] == "sad"].groupby("speaker").head(1)
    pd.concat([table[table["emotion"] == "happy"], rare]).to_csv("own/corpus.csv", index=False)
    assert ("loss weighted by class" in " ".join(data_of(*corpus, *flags))) == said


def test_mixup_mixes_labels_as_it_mixes_sound():
    batch = {"label": torch.eye(8), "mel": torch.eye(8)}
    mixed = er.mix(batch, 0.3)
    assert torch.equal(mixed["mel"], mixed["label"])
    sums = mixed["label"].sum(dim=1)
    assert torch.allclose(sums, torch.ones(8))


def test_word_dropout_hides_words_but_no_special_tokens(demo):
    cfg, clips = demo
    model = restored("bert", demo)
    plain = batch_of(model, clips, cfg)
    augmented = batch_of(model, clips, cfg, augment=True)
    before, after = plain["input_ids"], augmented["input_ids"]

    changed = before != after
    hidden = set(after[changed].tolist())
    assert hidden == {model.hidden_id}
    special = torch.isin(before, torch.tensor(model.special_ids))
    assert not changed[special].any()
    share = changed[~special].float().mean()
    assert share == pytest.approx(cfg.word_dropout, abs=0.1)


# %% Scores
def answered(probabilities, labels, classes=er.EMOTIONS):
    """The table of predictions of one system that answers clips of these labels with (N, C)."""
    emotions = [classes[label] for label in labels]
    clips = pd.DataFrame({"clip": range(len(emotions)), "emotion": emotions})
    answers = {"cnn": np.asarray(probabilities, float)}
    return er.predictions_table(answers, clips, classes)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8000, 8, generator=generator)
    probabilities = logits.softmax(dim=1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    labels = drawn[:, 0]
    found = er.fit_temperature(logits * temperature, labels)
    assert found == pytest.approx(temperature, rel=0.05)


def test_temperature_stays_moderate_when_validation_holds_no_mistake():
    assert er.fit_temperature(5 * torch.eye(8), torch.arange(8)) == 0.5


@pytest.mark.parametrize(("confidences", "right", "expected"), [
    ([0.8, 0.8, 0.6, 0.6], [1, 0, 1, 1], 0.35),
    ([1.0, 1.0], [1, 1], 0.0),
    ([1.0, 0.98], [0, 1], 0.49)])  # both in the last bin, where errors cancel in part
def test_calibration_error_of_counted_cases(confidences, right, expected):
    classes = ["happy", "sad"]
    first = np.array(confidences)
    probabilities = np.stack([first, 1 - first], axis=1)
    labels = 1 - np.array(right)
    table = answered(probabilities, labels, classes)
    scores = scores_of(table, classes)
    assert scores["ece"] == pytest.approx(expected)


def test_the_error_of_a_perfectly_calibrated_model_is_what_chance_gives():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.5] * 8, 600)
    borders = probabilities.cumsum(axis=1)
    found = []
    for _ in range(60):
        below = rng.random((600, 1)) > borders
        labels = below.sum(axis=1).clip(max=7)
        table = answered(probabilities, labels)
        scores = scores_of(table)
        found.append(scores["ece"])
    expected = np.mean(found)
    assert scores["ece_if_perfect"] == pytest.approx(expected, rel=0.1)

    sure = answered(np.eye(8), range(8))
    scores = scores_of(sure)
    assert scores["ece_if_perfect"] == 0


@pytest.mark.parametrize(("true", "found", "expected"), [
    ([0, 0, 0, 1], [0, 0, 1, 1], 5 / 6),
    ([2, 2, 5, 5], [2, 2, 0, 1], 0.5),
    ([7], [7], 1.0)])
def test_uar_is_the_mean_recall_of_the_classes_that_occur(true, found, expected):
    probabilities = np.eye(8)[found]
    table = answered(probabilities, true)
    uar = scores_of(table)["uar"]
    assert uar == pytest.approx(expected)


def test_every_score_of_a_counted_case():
    found = [0, 1, 2, 3, 4, 5, 6, 6, 1]
    probabilities = np.full((9, 8), 0.04)
    probabilities[range(9), found] = 0.72
    table = answered(probabilities, [0, 1, 2, 3, 4, 5, 6, 7, 0])

    scores = scores_of(table)
    assert json.loads(json.dumps(scores)) == scores
    scores.pop("ece_if_perfect")
    assert scores == pytest.approx({
        "clips": 9,
        "accuracy": 7 / 9,
        "uar": 6.5 / 8,
        "macro_f1": 6 / 8,
        "nll": -(7 * np.log(0.72) + 2 * np.log(0.04)) / 9,
        "ece": 7 / 9 - 0.72,
    })

    counts = er.confusion(table, er.EMOTIONS)
    assert list(counts.index) == list(counts.columns) == er.EMOTIONS
    assert counts.to_numpy().sum() == 9
    assert counts.loc["neutral"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert counts.loc["surprised"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def test_an_impossible_answer_costs_no_infinite_loss():
    labels = [1, 1, 2, 3, 4, 5, 6, 7]
    table = answered(np.eye(8), labels)
    scores = scores_of(table)
    expected = -np.log(1e-7) / 8
    assert scores["nll"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="session")
def said():
    """What two systems say to six windows of three clips: log-probabilities (V, W, C), and the windows."""
    generator = torch.Generator().manual_seed(0)
    hearing = torch.randn(5, 6, 8, generator=generator)
    reading = torch.randn(1, 6, 8, generator=generator)
    windows = pd.DataFrame({"clip": list("baaccc")})
    windows["voiced"] = [0.0, 0.5, 1.0, 0.0, 0.2, 0.3]  # b has no voice at all
    log_probs = {
        "cnn": hearing.log_softmax(dim=2),
        "rnn": reading.log_softmax(dim=2),
    }
    return log_probs, windows


@pytest.mark.parametrize("views", [1, 3, 5])
@pytest.mark.parametrize("name", ["cnn", "rnn"])
def test_a_clip_is_answered_by_views_then_temperature_then_windows(name, views, said):
    log_probs, windows = said
    calibration = {"cnn": 2.0, "rnn": 0.7}
    cfg = config(test_views=views)
    answers = er.predict(log_probs, windows, calibration, cfg)

    heard = log_probs[name][:views]
    logits = heard.mean(dim=0) / calibration[name]
    b, a1, a2, _, c2, c3 = logits.softmax(dim=1).numpy()
    a = (a1 + 2 * a2) / 3
    c = (2 * c2 + 3 * c3) / 5
    of_b, of_a, of_c = answers[name]
    assert of_b == pytest.approx(b)
    assert of_a == pytest.approx(a)
    assert of_c == pytest.approx(c)


def test_late_fusions_are_made_of_the_answers_of_clips(said):
    log_probs, windows = said
    calibration = {"cnn": 2.0, "rnn": 0.7, "learned_rnn": [0.8, 0.3]}
    answers = er.predict(log_probs, windows, calibration, config())
    assert list(answers) == ["cnn", "rnn", "late_rnn", "learned_rnn"]

    first, second = answers["cnn"], answers["rnn"]
    mean = (first + second) / 2
    assert np.allclose(answers["late_rnn"], mean)
    powers = first**0.8 * second**0.3
    sums = powers.sum(axis=1, keepdims=True)
    expected = powers / sums
    assert np.allclose(answers["learned_rnn"], expected, atol=1e-6)


def scrambled(checkpoint, split):
    """A Checkpoint that says something else to the windows of a split."""
    splits = np.array(checkpoint.windows["split"])
    rows = np.flatnonzero(splits == split)
    log_probs = checkpoint.log_probs.clone()
    log_probs[:, rows] = log_probs[:, rows].roll(3, dims=2)
    return checkpoint._replace(log_probs=log_probs)


def test_validation_alone_decides_temperatures_and_fusion_weights(demo, finished):
    cfg, _ = demo
    checkpoints = {
        "cnn": er.read_checkpoint(cfg, "cnn"),
        "rnn": er.read_checkpoint(cfg, "rnn"),
    }
    calibration = er.calibrate(checkpoints, cfg)
    assert list(calibration) == ["cnn", "rnn", "learned_rnn"]
    assert min(calibration["learned_rnn"]) >= 0

    results = er.read_results(finished / OUTPUT)
    [saved] = results.config["calibration"].values()
    for name, value in calibration.items():
        assert saved[name] == pytest.approx(value)

    for split in ("train", "validation", "test"):
        others = {}
        for name, checkpoint in checkpoints.items():
            others[name] = scrambled(checkpoint, split)
        changed = er.calibrate(others, cfg)
        assert (changed != calibration) == (split == "validation")


def test_calibration_warns_of_nothing(demo, recwarn):
    cfg, _ = demo
    torch.set_warn_always(True)
    try:
        er.calibrate({"rnn": er.read_checkpoint(cfg, "rnn")}, cfg)
    finally:
        torch.set_warn_always(False)
    messages = [str(warning.message) for warning in recwarn]
    assert messages == []


def log_probabilities(seed, skill, clips=400):
    """Log-probabilities (N, C) of answers that are better with more skill, chance with 0, and the labels."""
    labels = np.arange(clips) % 8
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(clips, 8))
    logits += skill * np.eye(8)[labels]
    log_probs = torch.from_numpy(logits).log_softmax(dim=1)
    return log_probs.numpy(), labels


def test_a_part_at_chance_is_given_hardly_any_weight():
    good, labels = log_probabilities(1, 3)
    chance, _ = log_probabilities(2, 0)
    logs = np.stack([good, 3 * chance])
    of_good, of_chance = er.fit_fusion_weights(logs, labels)
    assert of_good > 0.8
    assert 0 <= of_chance < 0.05


def test_learned_weights_suit_equal_parts_equally_and_never_hurt_on_what_they_saw():
    first, labels = log_probabilities(1, 1, 4000)
    second, _ = log_probabilities(2, 1, 4000)  # calibrated, both
    logs = np.stack([first, second])
    weights = er.fit_fusion_weights(logs, labels)
    assert weights[0] == pytest.approx(weights[1], rel=0.1)
    assert weights[0] == pytest.approx(1, abs=0.15)

    def nll(weights):
        joined = np.tensordot(weights, logs, 1)
        return F.cross_entropy(torch.from_numpy(joined), torch.from_numpy(labels))

    for fixed in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        assert nll(weights) < nll(fixed)


def test_learned_weights_stay_moderate_when_validation_holds_no_mistake():
    sure = torch.eye(8).mul(2).log_softmax(dim=1)
    logs = np.stack([sure, sure])
    weights = er.fit_fusion_weights(logs, np.arange(8))
    assert weights.max() < 2


def test_learned_weights_balance_the_classes():
    logs, labels = log_probabilities(3, 1)
    order = np.argsort(labels, kind="stable")  # first the 50 of class 0
    few, others = order[:5], order[50:]
    rare = np.concatenate([few, others])
    often = np.concatenate([np.repeat(few, 10), others])

    weights = []
    for rows in (rare, often):
        [weight] = er.fit_fusion_weights(logs[None, rows], labels[rows])
        weights.append(weight)
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)


# %% Command line
def constants_of_the_source():
    """Name -> (value, trailing comment) in the table of constants."""
    source = SCRIPT.read_text(encoding="utf-8")
    _, table, _ = re.split("# fmt: o[nf]+", source)
    found = {}
    for line in re.finditer(r"^([A-Z_]+) = (.+?) +# (.+)$", table, re.MULTILINE):
        name, value, comment = line.groups()
        found[name] = ast.literal_eval(value), comment
    return found


def flags_there():
    """All flags of the command line."""
    flags = set()
    for action in er.make_parser()._actions:
        flags.update(action.option_strings)
    return flags


def flag(name, value=True):
    """A flag without its value: --demo, --no-demo, --epochs-cnn."""
    dashed = name.lower().replace("_", "-")
    if value is False:
        return f"--no-{dashed}"
    return f"--{dashed}"


def outcome(*argv):
    """The settings of a command line but for `given`, or the sentence that ends it."""
    try:
        cfg = er.parse_settings(argv)
    except er.UserError as error:
        return str(error)
    return cfg._replace(given=())


def names_of_settings(*kinds):
    """The constants of some types."""
    return [name for name, kind in er.SETTINGS.items() if kind in kinds]


BOOLEANS = names_of_settings(bool)
TEXTS = ["RAVDESS_PATH", "MANIFEST", "OUTPUT_DIR", "INPUT", "TEXT"]
TEXTS += ["SENTENCES_CSV", "WHISPER_MODEL", "BERT_MODEL"]


def test_every_constant_is_a_flag_and_every_flag_a_constant():
    constants = constants_of_the_source()
    assert er.SETTINGS.keys() == constants.keys()
    negated = {flag(name, False) for name in BOOLEANS}
    positive = set(map(flag, constants))
    assert flags_there() == positive | negated | {"-h", "--help", "--version"}


def test_help_is_the_trailing_comment_of_each_constant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = er.make_parser().format_help()
    text = " ".join(text.split())
    for value, comment in constants_of_the_source().values():
        assert f"{comment} (default: {value})" in text


def test_readme_lists_twenty_flags_as_they_are_and_names_no_others():
    text = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(lines) == 20
    known = [f"| `{flag(name)}` | `{value}` | {comment} |"
             for name, (value, comment) in constants_of_the_source().items()]
    assert lines == [line for line in known if line in lines]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    companions = "".join(path.read_text(encoding="utf-8") for path in SCRIPT.parent.glob("archive/*.py"))
    theirs = set(re.findall(r'"(--[a-z-]+)"', companions))
    assert named <= flags_there() | theirs | {"--to", "--nthreads"}


def test_readme_is_short_and_its_first_lines_can_be_run():
    lines = SCRIPT.with_name("README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 230
    assert max(map(len, lines)) <= 110
    start = "\n".join(lines[:30])
    for command in ("uv run emotion_recognition.py --demo", "python3 -m venv .venv",
                    "pip install -r requirements.txt", "python emotion_recognition.py --demo", "&& pytest"):
        assert command in start


def test_the_python_of_the_readme_answers_for_a_recording(finished, capsys):
    readme = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    code, = re.findall("```python\n(.+?)```", readme, re.DOTALL)
    shutil.copytree(finished / OUTPUT, "outputs", copy_function=copy_or_link)
    written("me.wav", speech())
    exec(code, {})
    assert capsys.readouterr().out.strip() in er.EMOTIONS


@pytest.mark.parametrize("flag", ["--bert-model", "--speech-encoder", "--whisper-model"])
def test_weights_that_git_has_not_fetched_are_said(flag):
    Path("weights").mkdir()
    Path("weights/model.safetensors").write_text(LFS)
    name = "weights/model.safetensors" if "whisper" in flag else "weights"
    with pytest.raises(er.UserError, match=r"model.safetensors is a pointer of Git LFS .* git lfs pull"):
        er.parse_settings([flag, name])


def test_settings_are_read_only():
    cfg = config()
    with pytest.raises(AttributeError):
        cfg.seed = 7
    with pytest.raises(AttributeError):
        cfg.something_new = 7
    other = cfg._replace(seed=7)
    assert other.seed == 7
    assert cfg.seed == 42


def other_value(name):
    """A value that a setting may have and that is not its default."""
    default = getattr(er, name)
    allowed = er.ALLOWED.get(name.lower(), ("other", "other"))
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 + 0.1
    if isinstance(default, str):
        return allowed[1]
    if default == allowed[1]:
        return default - 1
    return default + 1


@pytest.mark.parametrize("name", sorted(er.SETTINGS.keys() - {"DEMO", "RUN_MODELS", "FOLDS"}))
def test_every_flag_sets_its_setting(name):
    value = other_value(name)
    argv = [flag(name), str(value)]
    if isinstance(value, bool):
        argv = [flag(name, value)]
    cfg = er.parse_settings(argv)
    key = name.lower()
    assert list(cfg.given) == [key]
    assert getattr(cfg, key) == value
    assert value != getattr(er, name)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", BOOLEANS)
def test_boolean_flags_work_both_ways(name, value):
    argv = [flag(name, value)]
    cfg = er.parse_settings(argv)
    assert getattr(cfg, name.lower()) is value


def test_a_constant_edited_at_run_time_counts(monkeypatch):
    monkeypatch.setattr(er, "EPOCHS_CNN", 3)
    cfg = er.parse_settings([])
    assert cfg.epochs_cnn == 3
    assert list(cfg.given) == []
    cfg = er.parse_settings(["--epochs-cnn", "4"])
    assert cfg.epochs_cnn == 4
    text = er.make_parser().format_help()
    assert "AudioCNN (default: 3)" in " ".join(text.split())


def test_a_whole_number_may_stand_for_a_constant_with_a_fraction(monkeypatch):
    monkeypatch.setattr(er, "MIXUP", 0)
    monkeypatch.setitem(er.SETTINGS, "MIXUP", int)  # as after the cell of constants ran again
    assert er.parse_settings([]).mixup == 0
    assert er.parse_settings(["--mixup", "0.5"]).mixup == 0.5


@pytest.mark.parametrize(("name", "value", "needed"), [
    ("EPOCHS_CNN", 0, "--epochs-cnn|0 |int|from 1"),
    ("EPOCHS_RNN", 2.5, "--epochs-rnn|2.5|int"),
    ("BATCH_SIZE", "many", "--batch-size|many|int"),
    ("DROPOUT", 1.5, "--dropout|1.5|0.99"),
    ("MIXUP", math.nan, "--mixup|nan|float"),
    ("TRIM_DB", math.inf, "--trim-db|inf"),
    ("SEED", -1, "--seed|-1|from 0"),
    ("TEST_VIEWS", 6, "--test-views|6|from 1 to 5"),
    ("EMA_DECAY", 1.0, "--ema-decay|1.0|0.9999"),
    ("PHASE", "study", "--phase|study|evaluate"),
    ("DEVICE", "tpu", "--device|tpu|mps"),
    ("FUSION", "late", "--fusion|late|attention"),
    ("SPLIT", "clip", "--split|clip|speaker|random"),
    ("RUN_MODELS", "cnn,lstm", "--run-models|lstm|fusion_rnn"),
    ("RUN_MODELS", ",", "--run-models|fusion_rnn"),
    ("FOLDS", "0,7", "--folds|0,7"),
    ("FOLDS", "1,1", "--folds|different"),
    ("CLIP_SECONDS", 0.1, "--clip-seconds 0.1|16 frames|--hop-length"),
    ("DEMO", "yes", "--demo|yes"),
    ("JSON", 1, "--json|1")])
def test_an_edited_constant_gets_the_sentence_of_its_flag(name, value, needed, monkeypatch):
    sentence = outcome(f"{flag(name)}={value}")
    for word in needed.split("|"):
        assert word in sentence
    assert "\n" not in sentence
    monkeypatch.setattr(er, name, value)
    assert outcome() == sentence


ANY_NUMBER = st.one_of(
    st.integers(-2, 2**32),
    st.integers(-2, 30),
    st.floats(),
    st.text(max_size=3))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(names_of_settings(int, float)), ANY_NUMBER)
@example("RUNS", 2**31)  # of which no list is made
def test_any_number_is_accepted_or_refused_as_a_flag_and_as_a_constant_alike(name, value):
    by_flag = outcome(f"{flag(name)}={value}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, name, value)
        by_constant = outcome()
    assert by_constant == by_flag
    if not isinstance(by_flag, str):
        assert getattr(by_flag, name.lower()) == float(value)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEXTS), st.text())
def test_any_text_may_be_a_flag_or_a_constant(name, text):
    by_flag = outcome(f"{flag(name)}={text}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, name, text)
        by_constant = outcome()
    for cfg in (by_flag, by_constant):
        assert getattr(cfg, name.lower()) == os.path.expanduser(text)  # noqa: PTH111


@pytest.mark.parametrize("argv", ["--nothing 0.1", "--demo=yes", "speech.wav", "-x"])
def test_what_is_no_flag_is_named_in_the_error(argv):
    sentence = outcome(*argv.split())
    assert re.split("[ =]", argv)[0] in sentence
    assert "--help lists every flag" in sentence


@pytest.mark.parametrize(("typed", "meant"), [
    ("--epoch-cnn 5", "--epochs-cnn"),
    ("--epochs_rnn=5", "--epochs-rnn"),
    ("--learning-rate 0.1", "--learning-rate-rnn"),
    ("--OUTPUT-DIR x", "--output-dir"),
    ("-demo", "--demo"),
    ("--no-seed", "--seed"),
    ("--no-use-simulated-sentence", "--no-use-simulated-sentences"),
])
def test_a_mistyped_flag_names_the_nearest_one(typed, meant):
    sentence = outcome(*typed.split())
    assert sentence.startswith("unrecognized arguments: ")
    assert sentence.endswith(f"(did you mean {meant}?)")


def test_help_is_grouped_as_the_constants_are_and_shows_every_phase(capsys):
    with pytest.raises(SystemExit):
        er.main(["--help"])
    shown = capsys.readouterr().out
    headings = re.findall("^([A-Z].*):$", shown, re.MULTILINE)
    assert headings == ["What to run", "Splits", "Words", "Sound", "Training"]
    before_training, training = shown.split("Training:")
    assert "--leave-out" in before_training and "--epochs-cnn" not in before_training
    assert "--mixup" in training

    examples = shown.split("examples:\n")[1].splitlines()
    assert all(line.startswith("python emotion_recognition.py") for line in examples)
    for phase in set(er.ALLOWED["phase"]) - {"all"}:
        assert any(f"--phase {phase}" in line for line in examples)
    for line in examples:
        argv = re.sub("   .*", "", line).split()[2:]  # what follows is what it does
        assert argv == ["--help"] or isinstance(outcome(*argv), er.Settings)


@pytest.mark.parametrize("folds", ["1,", " 1", "1 ,"])
def test_a_list_may_be_written_loosely(folds):
    argv = ["--folds", folds]
    cfg = er.parse_settings(argv)
    assert cfg.folds == "1"


@pytest.mark.parametrize("kernel", [
    "site-packages/ipykernel_launcher.py -f kernel.json",
    "site-packages/ipykernel_launcher.py --ip=127.0.0.1 --stdin=9003 --f=/run/kernel.json",
    "site-packages/colab_kernel_launcher.py -f /root/kernel.json",
    "site-packages/ipykernel/__main__.py -f kernel.json",
    "site-packages/spyder_kernels/console/__main__.py -f kernel.json"])
def test_the_arguments_of_a_kernel_are_ignored_however_it_was_started(kernel, monkeypatch):
    monkeypatch.setattr(er, "in_kernel", lambda: True)
    monkeypatch.setattr(sys, "argv", kernel.split())
    assert er.parse_settings() == er.parse_settings([])


def test_flags_given_to_the_script_count_in_a_kernel_too_and_a_mistyped_one_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels/emotion_recognition.py", "--seed", "5", "--n-fft", "512"])
    assert er.parse_settings().seed == 5
    monkeypatch.setattr(er, "in_kernel", lambda: True)  # as after %run in a notebook
    assert er.parse_settings().n_fft == 512
    monkeypatch.setattr(er, "in_kernel", lambda: False)
    monkeypatch.setattr(sys, "argv", ["emotion_recognition.py", "-f", "kernel.json"])
    with pytest.raises(er.UserError, match="-f"):
        er.parse_settings()


@pytest.mark.parametrize(("argv", "phase"), [
    ("--input a.wav", "predict"),
    ("--input a.wav --phase data", "data"),
    ("--text a.wav", "all")])
def test_a_recording_named_without_a_phase_is_predicted(argv, phase):
    cfg = er.parse_settings(argv.split())
    assert cfg.phase == phase


def test_the_demo_takes_fewer_epochs_but_no_more_than_a_constant_asks_for(monkeypatch):
    assert er.parse_settings(["--demo"]).epochs_cnn == 8
    assert er.parse_settings(["--demo", "--epochs-cnn=20"]).epochs_cnn == 20
    monkeypatch.setattr(er, "EPOCHS_CNN", 2)
    assert er.parse_settings(["--demo"]).epochs_cnn == 2


@pytest.mark.parametrize(("output_dir", "expected"), [
    ("outputs", "outputs/demo"),
    ("outputs/demo", "outputs/demo"),
    ("outputs/demo/fold_0_seed_42", "outputs/demo/fold_0_seed_42"),
    (".", "demo")])
def test_the_demo_has_a_folder_of_its_own_once(output_dir, expected):
    cfg = er.parse_settings(["--demo", "--output-dir", output_dir])
    assert Path(cfg.output_dir) == Path(expected)


def why_trained(module, cfg, clips):
    """Why each system must be trained, by name."""
    return {name: module.stale_because(cfg, name, clips) for name in EVERY}


@pytest.mark.parametrize("key", ["epochs", "learning_rate"])
@pytest.mark.parametrize("suffix", ["cnn", "rnn", "bert", "fusion"])
def test_each_model_has_its_own_epochs_and_learning_rate(key, suffix, demo):
    """A change of either is why that model is trained again, and no other one."""
    cfg, clips = demo
    names = FUSED
    if suffix in EVERY:
        names = [suffix]
    key = f"{key}_{suffix}"
    changed = cfg._replace(**{key: 3})
    reasons = why_trained(er, changed, clips)
    expected = f"{key} {getattr(cfg, key)} -> 3"
    assert reasons == {name: expected * (name in names) for name in EVERY}


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        er.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"emotion_recognition.py {er.__version__}\n"


@pytest.mark.parametrize("backend", ["nonsense", "module://no_such.backend"])
def test_an_inherited_plot_backend_that_cannot_be_loaded_breaks_nothing(backend, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    done = subprocess.run(
        [sys.executable, "-c", "import emotion_recognition as er; er.main(['--version'])"],
        capture_output=True,
        text=True,
        timeout=280)
    assert done.stderr == ""
    assert done.stdout == f"emotion_recognition.py {er.__version__}\n"


def test_the_metadata_of_the_script_are_the_requirements_but_for_pytest():
    source = SCRIPT.read_text(encoding="utf-8")
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source)
    metadata = re.sub("^# ?", "", block[1], flags=re.MULTILINE)
    assert 'requires-python = ">=3.10"' in metadata
    listed = re.search(r"^dependencies = (\[.*?\])", metadata, re.MULTILINE | re.DOTALL)
    dependencies = ast.literal_eval(listed[1])

    path = SCRIPT.with_name("requirements.txt")
    text = path.read_text(encoding="utf-8")
    plain = re.sub("#.*| ", "", text).split()
    needed = [line for line in plain if not line.startswith("pytest")]
    assert [line.replace(" ", "") for line in dependencies] == needed


# %% The digest of code
EVERY = list(er.TRAINED)
TEXT = ["rnn", "bert"]
FUSED = [name for name in EVERY if er.TRAINED[name].parts]
HEARING = ["cnn", "speech", *FUSED]


def edited_copy(*edits):
    """The script as another module, in which texts of some definitions are replaced."""
    import importlib.util
    lines = SCRIPT.read_text(encoding="utf-8").splitlines(keepends=True)
    for definition, old, new in edits:
        node = er.definitions()[definition]
        before = "".join(lines[node.lineno - 1:node.end_lineno])
        assert old in before
        after = before.replace(old, new).splitlines(keepends=True)
        lines[node.lineno - 1:node.end_lineno] = after

    path = Path("edited.py").absolute()
    path.write_text("".join(lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCIENCE = {  # what is edited: (definition, text, replacement, who is trained anew, who is not)
    "AudioCNN": ("AudioCNN", "nn.Tanh()", "nn.ReLU()", ["cnn"], ["speech", *TEXT]),
    "its blocks": ("ResidualBlock", "F.relu(y", "F.gelu(y", ["cnn"], ["speech", *TEXT]),
    "its views": ("VIEWS", "0.94", "0.93", ["cnn"], []),
    "what is stored of it": ("infer", ".log_softmax(dim=1)", ".softmax(dim=1)", ["cnn", *TEXT], []),
    "its augmentation": ("recolour", "0.75", "0.5", ["cnn"], []),
    "its noise": ("disturb", "-70", "-60", ["cnn"], []),
    "the floor of log-mels": ("FLOOR", "1e-7", "1e-6", HEARING, []),
    "the pauses that are cut": ("with_margins", "second / 4", "second / 3", HEARING, TEXT),
    "SpeechEncoder": ("SpeechEncoder", '"balanced"', "None", ["speech"], ["cnn", *TEXT]),
    "what it hears through": ("disturbed", "3400", "3500", ["speech"], ["cnn", *TEXT]),
    "what it hears with": ("whisper_states", ":3000", ":2000", ["speech"], ["cnn", *TEXT]),
    "TextRNN": ("TextRNN", "100", "99", ["rnn"], ["cnn", "bert"]),
    "what a word is": ("words_in", ".lower()", ".upper()", ["rnn"], ["cnn"]),
    "TextBERT": ("TextBERT", "padding()", "padding(length=9)", ["bert"], ["cnn", "rnn"]),
    "early fusion": ("EarlyFusion", "0.25", "0.2", FUSED, ["cnn", *TEXT]),
    "the length of a window": ("LONGEST", "6.0", "5.0", EVERY, []),
    "the base of all models": ("Encoder", "self.dropout(self.features", "(self.features", EVERY, []),
    "the trainer": ("Trainer", "5.0)", "1.0)", EVERY, []),
    "the epochs": ("fit_epoch", "shuffle=True", "shuffle=False", EVERY, []),
}
OTHERS = {  # definition: (text, replacement), without a new line
    "AudioCNN": ('"""A 2-D CNN', '"""A CNN'),
    "Trainer": ("# Weight decay is for matrices", "# Decay is for matrices"),
    "fit_epoch": ("accuracy = np.mean", "accuracy  =  np.mean"),
    "plot_comparison": ("steelblue", "gray"),
    "add_part": ("Cm(17)", "Cm(16)"),
    "reliability": ("confidence * 15", "confidence * 10"),
    "Predictor": ("480000", "480001"),
    "synthesize": ("0.8", "0.7"),
}


@pytest.mark.parametrize("what", SCIENCE)
def test_edited_science_trains_anew_and_says_so(what, demo):
    *edit, anew, kept = SCIENCE[what]
    edited = edited_copy(edit)
    cfg, clips = demo
    reasons = why_trained(edited, cfg, clips)
    for name in anew:
        assert reasons[name] == "code changed"
        assert edited.code_of(name) != er.code_of(name)
    for name in kept:
        assert reasons[name] == ""
        assert edited.code_of(name) == er.code_of(name)


def test_edited_science_is_no_reason_when_models_of_other_code_are_kept(demo):
    cfg, clips = demo
    edited = edited_copy(["Trainer", "5.0)", "1.0)"])
    keeping = cfg._replace(reuse_edited=True)
    reasons = why_trained(edited, keeping, clips)
    assert set(reasons.values()) == {""}


def test_edited_comments_docstrings_layout_plots_and_figures_train_nothing(demo):
    cfg, clips = demo
    edits = [(definition, *texts) for definition, texts in OTHERS.items()]
    edited = edited_copy(*edits)
    reasons = why_trained(edited, cfg, clips)
    assert set(reasons.values()) == {""}


def test_a_docstring_where_there_was_none_trains_nothing(demo):
    cfg, clips = demo
    old = "super().__init__()\n"
    edited = edited_copy(["Encoder", old, f'"""New."""\n        {old}'])
    reasons = why_trained(edited, cfg, clips)
    assert set(reasons.values()) == {""}


def science_run_by(call):
    """The definitions between the landmarks whose code a call runs."""
    names = list(er.definitions())
    science = set(names[names.index("Corpus"):names.index("SYSTEMS")])
    places = {}
    for name, node in er.definitions().items():
        first = node.lineno - len(getattr(node, "decorator_list", []))
        places |= dict.fromkeys(range(first, node.end_lineno + 1), name)
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename == er.__file__:
            found.add(places.get(code.co_firstlineno))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found & science


@pytest.mark.parametrize("name", ["cnn", "speech", *TEXT])
def test_all_that_runs_while_a_model_is_trained_counts_as_its_code(name, demo, monkeypatch):
    cfg, clips = demo
    kind = er.SYSTEMS[name].kind

    def training():
        if name in WORDLESS:
            er.load_clip(clips["path"][0], cfg)
        own = cfg._replace(output_dir="new")  # where no features are cached
        er.train(kind, {}, clips, own, "cpu", Path("state.pth"), {})

    run = science_run_by(training)
    of_kind = {"speech": {"whisper_states", "disturbed"}}.get(name, {"fit_in_epochs", "Trainer"})
    assert run >= {"train", kind.__name__} | of_kind
    monkeypatch.setattr(er, "code_from", er.code_from.__wrapped__)  # which remembers nothing
    before = er.code_of(name)
    nodes = dict(er.definitions())
    monkeypatch.setattr(er, "definitions", lambda: nodes)
    for definition in run:
        node = nodes[definition]
        nodes[definition] = ast.Pass()
        assert er.code_of(name) != before, definition
        nodes[definition] = node


def test_the_science_stands_between_its_two_landmarks():
    names = list(er.definitions())
    first = names.index("Corpus")
    last = names.index("SYSTEMS")
    science = set(names[first:last])
    for needed in (
            "split_clips", "add_transcripts", "load_clip", "mel_power", "windows_of", "ClipDataset",
            "mask", "mix", "ResidualBlock", "CrossAttention", "Trainer", "fit_in_epochs", "infer",
            "SpeechEncoder", "speech_features", "whisper_states"):
        assert needed in science
    for system in er.TRAINED.values():
        ancestors = {kind.__name__ for kind in system.kind.__mro__}
        assert ancestors & set(names) <= science

    others = [name for name in names if name.startswith("plot_")]
    assert len(others) > 5
    others += ["Settings", "parse_settings", "score", "write_report", "Predictor", "synthesize", "main"]
    for name in others:
        assert name in names
        assert name not in science


# %% The models
READING = [*TEXT, *FUSED]
every_model = pytest.mark.parametrize("name", EVERY)
every_network = pytest.mark.parametrize("name", IN_EPOCHS)
every_reader = pytest.mark.parametrize("name", READING)
every_fusion = pytest.mark.parametrize("name", FUSED)


def fresh(name, demo):
    """A model as its training starts."""
    cfg, clips = demo
    torch.manual_seed(cfg.seed)
    system = er.SYSTEMS[name]
    shape = {"classes": 8, "dropout": cfg.dropout}
    parts = {part: er.read_checkpoint(cfg, part) for part in system.parts}
    return system.kind.start(shape, clips, cfg, parts)


def restored(name, demo):
    """A model as it was trained."""
    cfg, _ = demo
    checkpoint = er.read_checkpoint(cfg, name)
    return er.restore(checkpoint)


@every_model
def test_logits_do_not_depend_on_batch_mates(name, demo):
    cfg, clips = demo
    model = fresh(name, demo).eval()
    batch = batch_of(model, clips[:8], cfg)
    together = model(batch)
    assert together.shape == (8, 8)
    assert together.std(dim=0).min() > 0
    for row in range(8):
        batch = batch_of(model, clips[row:row + 1], cfg)
        [alone] = model(batch)
        assert torch.allclose(alone, together[row], atol=1e-4)


@every_model
def test_gradients_reach_every_parameter_that_is_not_frozen(name, demo):
    cfg, clips = demo
    model = fresh(name, demo).train()
    batch = batch_of(model, clips, cfg, augment=True)
    logits = model(batch)
    F.cross_entropy(logits, batch["label"]).backward()

    assert (name in FUSED) == hasattr(model, "encoders")
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        if key.startswith("encoders."):
            assert gradient is None
        elif not key.endswith("bias"):  # softmax ignores a score's bias
            assert gradient.abs().sum() > 0


@every_network
def test_every_network_overfits_one_batch(name, demo):
    cfg, clips = demo
    kind = er.SYSTEMS[name].kind
    rate = f"learning_rate_{kind.suffix}"
    cfg = cfg._replace(dropout=0.0, label_smoothing=0.0, **{rate: 8e-3})
    model = fresh(name, (cfg, clips)).train()
    trainer = er.Trainer(model, cfg, 40, "cpu")
    batch = batch_of(model, clips[::12], cfg)  # a clip of every emotion
    losses = []
    for _ in range(40):
        loss, _ = trainer.step(batch)
        losses.append(loss)

    logits = model.eval()(batch)  # early fusion drops parts in training
    assert torch.equal(logits.argmax(dim=1), batch["label"])
    assert F.cross_entropy(logits, batch["label"]) < 0.5
    assert losses[0] > 1.5


@every_model
def test_a_checkpoint_gives_the_predictions_that_were_saved(name, demo, finished):
    cfg, clips = demo
    checkpoint = er.read_checkpoint(cfg, name)
    model = er.restore(checkpoint)
    assert type(model) is er.SYSTEMS[name].kind
    assert not model.training

    windows = er.windows_of(clips, cfg)
    log_probs = er.infer(model, windows, cfg, "cpu")
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs, checkpoint.log_probs, atol=1e-5)
    same = er.restore(checkpoint)
    again = er.infer(same, windows, cfg, "cpu")
    assert torch.equal(log_probs, again)

    results = er.read_results(finished / OUTPUT)
    [calibration] = results.config["calibration"].values()
    mean = log_probs.mean(dim=0)
    logits = mean / calibration[name]
    expected = logits.softmax(dim=1)
    table = results.predictions.query("system == @name")
    assert list(table["clip"]) == list(clips["clip"])
    assert np.allclose(table[er.EMOTIONS], expected, atol=1e-5)


@every_model
def test_a_checkpoint_says_what_it_was_trained_on(name, demo):
    cfg, _ = demo
    checkpoint = er.read_checkpoint(cfg, name)
    reads = name in READING
    assert checkpoint.system == name
    assert checkpoint.classes == er.EMOTIONS
    assert checkpoint.settings["seed"] == 42
    assert checkpoint.words == "simulated" * reads
    caveats = str(checkpoint.caveats)
    assert "synthetic" in caveats
    assert ("oracle" in caveats) == reads

    epochs = [epoch["epoch"] for epoch in checkpoint.history]
    assert epochs == [1] * (name in IN_EPOCHS)
    assert all(0 <= epoch["validation_uar"] <= 1 for epoch in checkpoint.history)


@every_model
def test_a_model_is_used_again_until_what_it_depends_on_changes(name, demo):
    cfg, clips = demo
    assert er.stale_because(cfg, name, clips) == ""
    fewer = cfg._replace(test_views=1)
    assert er.stale_because(fewer, name, clips) == ""
    other = cfg._replace(seed=7)
    assert er.stale_because(other, name, clips) == "seed 42 -> 7"

    others = clips.assign(digest="other")
    assert er.stale_because(cfg, name, others) == "clips changed"
    others = clips.assign(transcript="Something else.")
    expected = "transcripts changed" * (name in READING)
    assert er.stale_because(cfg, name, others) == expected


@every_model
def test_weights_that_do_not_fit_the_model_are_refused(name, demo):
    cfg, _ = demo
    checkpoint = er.read_checkpoint(cfg, name)
    fewer = dict(checkpoint.weights)
    fewer.popitem()
    title = er.SYSTEMS[name].title
    sentence = f"^{title} was made by another version of this script: train with --phase all"
    for change in ({"weights": fewer}, {"spec": {"classes": 8}}):
        wrong = checkpoint._replace(**change)
        with pytest.raises(er.UserError, match=sentence):
            er.restore(wrong)


def test_audiocnn_leaves_five_different_views_speechencoder_three_and_the_others_one(demo):
    cfg, _ = demo
    for name in EVERY:
        views = er.read_checkpoint(cfg, name).log_probs
        assert len(views) == {"cnn": 5, "speech": 3}.get(name, 1)
        for first, second in itertools.combinations(views, 2):
            assert not torch.allclose(first, second, atol=1e-4)


def padded(batch):
    """A batch with five more places of padding after each text."""
    longer = dict(batch)
    for key in batch.keys() & {"tokens", "input_ids", "attention_mask"}:
        longer[key] = F.pad(batch[key], (0, 5))
    return longer


@every_reader
def test_padding_never_changes_an_answer(name, demo):
    cfg, clips = demo
    model = restored(name, demo)
    batch = batch_of(model, clips[:8], cfg)
    expected = model(batch)
    assert torch.allclose(model(padded(batch)), expected, atol=1e-5)


@every_reader
def test_any_transcript_has_an_answer(name, demo):
    cfg, clips = demo
    model = restored(name, demo)
    texts = ["", "...", "qwertz \u00e9\U0001f600", "word " * 600]
    clips = clips[:4].assign(transcript=texts)
    logits = model(batch_of(model, clips, cfg))
    assert logits.shape == (4, 8)
    assert logits.isfinite().all()


@every_fusion
def test_a_fused_model_answers_with_one_modality(name, demo):
    """Each answer depends on what is there, not on what is missing."""
    cfg, clips = demo
    model = restored(name, demo)
    batch = batch_of(model, clips[:16], cfg)
    both = model(batch)
    sound = {"mel": batch["mel"]}
    words = {key: value for key, value in batch.items() if key != "mel"}
    for part in (sound, words):
        logits = model(part)
        assert logits.shape == (16, 8)
        assert logits.isfinite().all()
        assert logits.std(dim=0).min() > 0
        assert not torch.allclose(logits, both, atol=1e-3)


def test_attention_reads_the_other_modality_step_by_step_and_nothing_masked():
    torch.manual_seed(0)
    cross = er.CrossAttention(128, 64, 0.0).eval()
    steps = torch.randn(2, 5, 128)
    others = torch.randn(2, 7, 64)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, :4] = True

    some, none = cross(steps, others, mask)
    assert torch.equal(none, steps[1])
    assert not torch.allclose(some, steps[0], atol=1e-2)

    others[~mask] = 9.0
    again, _ = cross(steps, others, mask)
    assert torch.allclose(some, again)


@pytest.mark.parametrize(("kind", "expected"), [
    ("concat", ["Early fusion, RNN"]),
    ("attention", ["Attention fusion, RNN"]),
    ("both", ["Early fusion, RNN", "Attention fusion, RNN"])])
def test_fusion_decides_what_is_planned(kind, expected, copied, trained, monkeypatch, capsys):
    monkeypatch.setattr(er, "publish", lambda results: None)
    er.main([*DEMO, "--fusion", kind, "--run-models", "cnn,fusion_rnn"])
    printed = capsys.readouterr().out
    plan = re.findall(r"^  (\w.*?)  +used again$", printed, re.MULTILINE)
    assert plan == ["AudioCNN", "TextRNN", *expected]  # TextRNN is a part
    assert trained == []


@every_fusion
def test_early_fusion_leaves_its_parts_as_they_were_trained(name, demo):
    cfg, _ = demo
    fused = er.read_checkpoint(cfg, name).weights
    for part in er.SYSTEMS[name].parts:
        weights = er.read_checkpoint(cfg, part).weights
        for key, value in weights.items():
            assert torch.equal(value, fused[f"encoders.{part}.{key}"])


def test_training_is_reproducible(demo, corpus):
    cfg, clips = demo
    first = er.read_checkpoint(cfg, "rnn")
    torch.rand(3)  # whatever was drawn before must not matter
    again = cfg._replace(output_dir="again")
    other = cfg._replace(output_dir="other", seed=7)
    for run in (again, other):
        er.train_system(run, "rnn", clips, corpus, "cpu")

    second = er.read_checkpoint(again, "rnn")
    for key, value in first.weights.items():
        assert torch.equal(value, second.weights[key])
    assert torch.equal(first.log_probs, second.log_probs)

    third = er.read_checkpoint(other, "rnn")
    assert not torch.equal(first.log_probs, third.log_probs)


# %% End to end: what a run leaves
DOCUMENT = OUTPUT / "emotion_recognition_report.docx"
PLOTS = "class_counts", "samples", "training_curves", "comparison", "reliability", "coverage"
TABLES = ["predictions.csv", "histories.csv", "clips.csv", "left_out.csv"]
LEFT_BY_A_RUN = ["metrics.json", "results.tex", "config.json", "audit.json", *TABLES]
PICKLES = ["label_encoder.pkl", "ravdess_transcripts_simulated.pkl"]
LEFT_OUT = "not run: not asked for, or not trained"
SAVE_FIGURE = er.save_figure  # fixtures replace it


def left_by(*names):
    """The names of all files that a single run of these systems leaves, sorted."""
    files = [*LEFT_BY_A_RUN, *PICKLES, DOCUMENT.name]
    for plot in PLOTS:
        files.append(f"plots/{plot}.png")
    for name in names:
        file = er.SYSTEMS[name].file
        files.append(f"plots/confusion_{file}.png")
        if name in er.TRAINED:
            files.append(f"{file}_best.pth")
    return sorted(files)


def files_in(folder):
    """The names of the visible files in a folder and its subfolders but for its cache, sorted."""
    names = []
    for path in Path(folder).rglob("[!.]*"):
        if path.is_file() and path.parent.name != "cache":
            name = path.relative_to(folder)
            names.append(name.as_posix())
    return sorted(names)


def config_of(folder=OUTPUT):
    return read_json(Path(folder, "config.json"))


def calibration_of(folder=OUTPUT):
    """The temperatures and fusion weights of a single run, by system."""
    (calibration,) = config_of(folder)["calibration"].values()
    return calibration


def place_of(name, folder=OUTPUT):
    return Path(folder, f"{er.SYSTEMS[name].file}_best.pth")


def checkpoint_of(name, folder=OUTPUT):
    """What torch loads from the one file of a training: tensors and builtins."""
    return torch.load(place_of(name, folder), weights_only=True)


def of_system(name, table, split=""):
    """The predictions of one system by clip, of one split if it is named."""
    part = table[table["system"] == name]
    if split:
        part = part[part["split"] == split]
    return part.set_index("clip")


def probabilities_of(name, table, clips=None):
    """The probabilities of one system as a DataFrame by clip; of some clips, in their order, if named."""
    table = of_system(name, table)[er.EMOTIONS]
    if clips is not None:
        table = table.loc[clips]
    return table


def right(table):
    return table["emotion"] == table["predicted"]


def uar(table):
    by_emotion = right(table).groupby(table["emotion"])
    return by_emotion.mean().mean()


def times_of_checkpoints():
    times = {}
    for path in OUTPUT.rglob("*.pth"):
        times[path.name] = path.stat().st_mtime_ns
    return times


def plan_of(printed):
    """The plan of a run on the console: what is to happen to each model, by its title."""
    lines = re.findall(r"^  (\w.*?) +(is trained .*|used again|taken back.*)$", printed, re.MULTILINE)
    return dict(lines)


def document(path):
    import docx
    return docx.Document(path)


def pictures_in(path):
    pictures = document(path).inline_shapes
    return len(pictures)


def header_of(path):
    header = document(path).sections[0].header
    return header.paragraphs[0].text


def table_in(path, column, caption=""):
    """The first table of a .docx with a column of this name, under such a caption, as texts."""
    captions = [text for kind, text in captions_in(path) if kind == "Table"]
    for table, above in zip(document(path).tables, captions, strict=True):
        lines = []
        for row in table.rows:
            lines.append([cell.text for cell in row.cells])
        if column in lines[0] and caption in above:
            return pd.DataFrame(lines[1:], columns=lines[0])
    raise AssertionError(f"{path} has no table with {column}")


def copy_models(finished, *names, folder=OUTPUT):
    """Copy the demo's corpus, and trained models of it into a folder."""
    shutil.copytree(finished / CORPUS, CORPUS)
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(place_of(name, finished / OUTPUT), folder)


def settings_again(folder):
    """The settings that a run wrote down, and those that its command gives."""
    saved = config_of(folder)
    program, script, *flags = shlex.split(saved["command"])
    assert (program, script) == ("python", "emotion_recognition.py")
    again = er.parse_settings(flags)
    saved = saved["settings"]
    saved.pop("given", None)
    return saved, {key: getattr(again, key) for key in saved}


@pytest.fixture
def undrawn(monkeypatch):
    """No plot is drawn, which is most of the time that results take."""
    def close(figure, *_, **__):
        er.plt.close(figure)

    monkeypatch.setattr(er, "draw_plots", lambda results: None)
    monkeypatch.setattr(er, "save_figure", close)


@pytest.fixture(scope="session")
def output(finished):
    """The folder of the finished demo's results."""
    return finished / OUTPUT


@pytest.fixture(scope="session")
def demo_predictions(output):
    """The finished demo's predictions."""
    return predictions(output)


@pytest.fixture
def heard(finished):
    """The flag that names the finished demo's corpus as if it were real."""
    return ["--ravdess-path", str(finished / CORPUS)]


@pytest.fixture
def worded(finished):
    """The flags of a demo whose only model, TextRNN, is trained already."""
    copy_models(finished, "rnn")
    return [*DEMO, "--run-models", "rnn"]


@pytest.fixture
def paired(finished):
    """The flags of a demo whose models that read no BERT are trained already."""
    copy_models(finished, "cnn", "rnn", "fusion_rnn", "attention_rnn")
    return [*DEMO, "--run-models", "cnn,rnn,fusion_rnn"]


@pytest.fixture
def edited(monkeypatch):
    """The code that trainings depend on is not that of the finished demo."""
    monkeypatch.setattr(er, "code_of", lambda name: "edited")


def test_a_run_leaves_everything_that_it_should_and_nothing_else(output):
    names = left_by(*SHOWN)
    assert files_in(output) == names
    for name in names:
        path = output / name
        assert path.stat().st_size > 10, name


@pytest.mark.parametrize("split", er.SPLITS)
def test_figures_of_every_system_agree_with_its_predictions(split, output, demo_predictions):
    lines = figures(output, split=split)
    assert list(lines) == SHOWN
    for name, line in lines.items():
        part = of_system(name, demo_predictions, split)
        assert line["clips"] == len(part) > 0
        assert line["accuracy"] == pytest.approx(right(part).mean())
        assert line["uar"] == pytest.approx(uar(part))


def test_figures_are_there_for_every_group_of_clips(output):
    lines = pd.DataFrame(read_json(output / "metrics.json"))
    assert set(lines["by"]) == {"", "fold seed", "actor", "sex", "intensity", "statement", "emotion"}


@pytest.mark.parametrize("by", ["actor", "sex", "intensity", "statement", "emotion"])
def test_figures_by_group_are_those_of_the_clips_in_the_group(by, output, demo_predictions):
    lines = pd.DataFrame(read_json(output / "metrics.json"))
    lines = lines.query("by == @by and system == 'rnn' and split == 'test'")
    lines = lines.set_index(by)
    groups = of_system("rnn", demo_predictions, "test").groupby(by)
    assert set(lines.index) == set(groups.groups)
    for group, part in groups:
        assert lines.loc[group, "clips"] == len(part)
        assert lines.loc[group, "uar"] == pytest.approx(uar(part))


def test_only_systems_that_read_simulated_sentences_are_called_oracles(output):
    titles = config_of(output)["titles"]
    assert list(titles) == SHOWN
    for name, title in titles.items():
        assert ("oracle" in title) == (name not in WORDLESS)


@pytest.mark.parametrize("name", SHOWN)
def test_predictions_keep_the_class_order_and_name_the_strongest(name, demo_predictions):
    part = of_system(name, demo_predictions)
    assert len(part) == 96
    assert part.index.is_unique
    columns = list(part)
    first = columns.index("neutral")
    assert columns[first:first + 8] == er.EMOTIONS

    shares = part[er.EMOTIONS].to_numpy()
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)
    places = part["predicted"].map(er.EMOTIONS.index)
    chosen = shares[range(96), places]
    strongest = shares.max(axis=1)
    assert np.allclose(chosen, strongest, atol=2e-6)  # ties by rounding to six decimals

    codes = part.index.str[6:8].astype(int)
    labels = part["emotion"].map(er.EMOTIONS.index)
    assert list(labels) == list(codes - 1)
    assert part["caveats"].str.contains("synthetic.*oracle").all()


@pytest.mark.parametrize("name", ["late_rnn", "late_bert"])
def test_late_fusion_is_the_mean_of_its_parts(name, demo_predictions):
    sound, text = er.SYSTEMS[name].parts
    total = probabilities_of(sound, demo_predictions)
    total = total + probabilities_of(text, demo_predictions)
    fused = probabilities_of(name, demo_predictions)
    assert np.allclose(fused, total / 2, atol=2e-6)


def test_learned_fusion_weighs_its_parts_as_the_calibration_says(output, demo_predictions):
    weights = calibration_of(output)["learned_rnn"]
    logits = 0
    for part, weight in zip(("cnn", "rnn"), weights):
        shares = probabilities_of(part, demo_predictions)
        logits = logits + weight * np.log(shares)

    expected = torch.tensor(logits.to_numpy()).softmax(dim=1)
    fused = probabilities_of("learned_rnn", demo_predictions)
    assert np.allclose(fused, expected, atol=1e-4)


@pytest.mark.parametrize("name, views", [("cnn", 5), ("speech", 3), ("rnn", 1), ("fusion_rnn", 1)])
def test_one_file_per_training_holds_the_answers_of_all_its_views(name, views, output, demo_predictions):
    checkpoint = checkpoint_of(name, output)
    log_probs = checkpoint["log_probs"]
    assert log_probs.shape == (views, 96, 8)
    sums = log_probs.exp().sum(dim=2)
    assert torch.allclose(sums, torch.ones(views, 96), atol=1e-4)

    temperature = calibration_of(output)[name]
    logits = log_probs.mean(dim=0) / temperature
    clips = checkpoint["windows"]["clip"]
    saved = probabilities_of(name, demo_predictions, clips)
    assert np.allclose(saved, logits.softmax(dim=1), atol=1e-5)


@every_network
def test_one_file_per_training_holds_its_history(name, output):
    histories = pd.read_csv(output / "histories.csv")
    saved = histories[histories["system"] == name]
    checkpoint = checkpoint_of(name, output)
    history = pd.DataFrame(checkpoint["history"])
    assert len(history) == 1
    saved = saved[list(history)].reset_index(drop=True)
    pd.testing.assert_frame_equal(saved, history, atol=1e-6)


def test_what_is_solved_at_once_has_no_history(output):
    assert checkpoint_of("speech", output)["history"] == []
    assert "speech" not in set(pd.read_csv(output / "histories.csv")["system"])


REPORTED = [
    "synthetic",
    "simulated sentences (oracle)",
    "python emotion_recognition.py --",
    "train 48 clips",
    "CC BY-NC-SA",
    "judging people",
    "Text encoder of the BERT systems",
]


def test_report_has_its_tables_pictures_and_caveats(output):
    path = output / DOCUMENT.name
    titles = config_of(output)["titles"]
    results, fit = table_in(path, "test UAR"), table_in(path, "train acc")
    for table in (results, fit):
        assert list(table["system"]) == list(titles.values())
    assert {"95 % interval", "acc", "macro-F1"} <= set(results)
    assert {"val UAR", "val NLL", "NLL", "ECE", "if perfect"} <= set(fit)
    assert pictures_in(path) == len(PLOTS) + len(SHOWN)

    text = text_of(path)
    for words in REPORTED:
        assert words in text, words
    assert re.search("synthetic.*oracle", header_of(path))


def test_report_shows_the_settings_that_shaped_it_and_no_others(output):
    lines = table_in(output / DOCUMENT.name, "setting").set_index("setting")
    assert lines.loc["epochs_cnn", "value"] == "1"
    settings = config_of(output)["settings"]
    for key, line in lines.iterrows():
        assert line["value"] == str(settings[key])
        assert line["value"]
    assert {"json", "input", "phase", "given", "sentences_csv"}.isdisjoint(lines.index)
    assert {"seed", "folds", "dropout", "n_mels"} <= set(lines.index)


def test_report_is_on_a4_and_every_page_has_its_number(output):
    section = document(output / DOCUMENT.name).sections[0]
    assert round(section.page_width.cm, 1) == 21.0
    assert round(section.page_height.cm, 1) == 29.7
    assert 'w:instr="PAGE"' in section.footer._element.xml
    for table in document(output / DOCUMENT.name).tables:
        width = sum(column.width.cm for column in table.columns)
        assert width == pytest.approx(17, abs=0.1)  # between the margins


def test_report_begins_with_the_date_and_the_command_of_the_run(output):
    config = config_of(output)
    texts = [part.text for part in document(output / DOCUMENT.name).paragraphs]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", config["date"])
    assert texts[1] == f"{config['date']}: {config['subject']}."
    assert texts[2] == config["command"]


def captions_in(path):
    """(kind, caption) of each table and figure of a .docx, in the order of the pages."""
    found, caption = [], ""
    for part in document(path).element.body:
        if part.tag.endswith("}tbl"):
            found.append(("Table", caption))
        elif part.xpath(".//pic:pic"):
            found.append(("Figure", caption))
        caption = "".join(text.text for text in part.xpath(".//w:t"))
    return found


def test_every_table_and_figure_has_a_caption_numbered_in_the_order_of_the_pages(output):
    captions = captions_in(output / DOCUMENT.name)
    assert len(captions) > 20
    numbers = {"Table": 0, "Figure": 0}
    for kind, caption in captions:
        numbers[kind] += 1
        assert re.match(rf"{kind} {numbers[kind]}\. \w.*\.$", caption), caption
    assert numbers["Figure"] == pictures_in(output / DOCUMENT.name)
    assert captions[0] == ("Table", f"Table 1. Test split of {config_of(output)['subject']}.")
    assert captions[1] == ("Figure", "Figure 1. UAR of all systems, those that only hear in blue.")


def test_headers_of_tables_are_repeated_on_every_page_and_no_row_breaks(output):
    for table in document(output / DOCUMENT.name).tables:
        first, *others = [row._tr.xml for row in table.rows]
        assert "w:tblHeader" in first
        for row in (first, *others):
            assert "w:cantSplit" in row
        for row in others:
            assert "w:tblHeader" not in row


def test_the_method_names_networks_with_their_real_parameters_and_what_validation_decided(output):
    lines = table_in(output / DOCUMENT.name, "parameters").set_index("system")
    titles, decided = config_of(output)["titles"], calibration_of(output)
    assert list(lines.index) == [titles[name] for name in decided]
    histories = pd.read_csv(output / "histories.csv")
    for name, value in decided.items():
        line = lines.loc[titles[name]]
        assert line["decided"] == str(np.round(value, 2))
        if name not in IN_EPOCHS:
            assert list(line[["parameters", "epoch", "seconds"]]) == ["-"] * 3
            continue
        cfg = er.parse_settings([])._replace(output_dir=str(output))
        model = er.restore(er.read_checkpoint(cfg, name))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert int(line["parameters"]) == trained
        part = histories[histories["system"] == name]
        assert int(line["epoch"]) == len(part) == 1
        assert int(line["seconds"]) == round(part["seconds"].sum())

    text = text_of(output / DOCUMENT.name)
    assert f"log-mel spectrograms of {er.N_MELS} bands" in text
    assert f"Hardware: {config_of(output)['versions']['hardware']}." in text
    assert "no epoch is picked" in text


def test_versions_stand_in_a_table(output):
    lines = table_in(output / DOCUMENT.name, "version")
    assert dict(zip(lines["what"], lines["version"])) == config_of(output)["versions"]
    assert {"python", "torch", "hardware"} <= set(lines["what"])


def test_every_share_in_the_report_is_written_in_one_way(output):
    path = output / DOCUMENT.name
    for table in document(path).tables:
        for row in table.rows:
            for cell in row.cells:
                assert not re.search(r"\d%|\d\.\d\d %", cell.text)
    for share in table_in(path, "test UAR")["test UAR"]:
        assert re.fullmatch(r"\d+\.\d %", share)


def test_the_interval_of_a_single_fold_is_shown_and_explained(output):
    path = output / DOCUMENT.name
    shown = table_in(path, "test UAR").set_index("system")["95 % interval"]
    summary = er.summarize(er.read_results(output))
    for name, title in config_of(output)["titles"].items():
        low, high = 100 * summary.loc[name, ["low", "high"]]
        assert shown[title] == f"{low:.1f} % to {high:.1f} %"
    assert "The 95 % interval says how far the UAR moves with the speakers" in text_of(path)


def test_the_table_of_results_is_there_for_latex_with_the_same_figures(output):
    comment, *lines = (output / "results.tex").read_text(encoding="utf-8").splitlines()
    assert re.match("% RAVDESS, fold 0.*synthetic.*oracle", comment)
    rows = [line.removesuffix(r" \\") for line in lines if line.endswith(r"\\")]
    header, *rows = [row.replace(r"\%", "%").split(" & ") for row in rows]
    table = er.table_of(er.read_results(output))
    assert header == list(table)
    assert rows == table.to_numpy().tolist()


@pytest.mark.parametrize("by, group, caption", [
    ("sex", "male", "Test UAR by sex"),
    ("emotion", "sad", "Recall of each emotion"),
    ("intensity", "normal", "Test UAR by intensity"),
])
def test_report_has_the_uar_of_every_system_in_every_group(by, group, caption, output, demo_predictions):
    test = demo_predictions[demo_predictions["split"] == "test"]
    lines = table_in(output / DOCUMENT.name, group, caption).set_index("system")[group]
    titles = config_of(output)["titles"]
    assert set(lines.index) == set(titles.values())

    for name, title in titles.items():
        expected = uar(of_system(name, test[test[by] == group]))
        assert lines[title] == er.percent(expected)


def test_report_has_the_uar_of_the_first_system_for_every_speaker(output, demo_predictions):
    lines = table_in(output / DOCUMENT.name, "actor")
    test = of_system("cnn", demo_predictions, "test")
    actors = sorted(test["actor"].unique())
    assert list(lines["actor"]) == list(map(str, actors))
    for actor, shown in zip(actors, lines["AudioCNN"]):
        assert shown == er.percent(uar(test[test["actor"] == actor]))


def test_the_command_that_is_written_down_gives_the_same_settings(output):
    saved, again = settings_again(output)
    assert saved == again
    assert saved["demo"]


# %% End to end: what is used again
def test_the_same_command_again_trains_nothing_and_says_so(copied, trained, unpublished, undrawn, capsys):
    times = times_of_checkpoints()
    before = contents(OUTPUT)
    er.main(DEMO)
    plan = plan_of(capsys.readouterr().out)
    assert trained == []
    assert list(plan.values()) == ["used again"] * 8
    assert times_of_checkpoints() == times
    assert contents(OUTPUT) == before


def test_a_finished_run_in_another_folder_is_used_again_and_named(worded, trained, unpublished, undrawn):
    shutil.move(OUTPUT, "mine/demo")
    er.main([*worded, "--output-dir", "mine"])
    assert trained == []
    saved, again = settings_again("mine/demo")
    assert saved == again
    assert Path(saved["output_dir"]) == Path("mine/demo")


def test_new_epochs_retrain_the_model_and_what_hangs_on_it(paired, trained, unpublished, undrawn, capsys):
    times = times_of_checkpoints()
    before = contents(OUTPUT)
    command = [*paired, "--phase", "fusion", "--epochs-cnn", "2"]
    er.main(command)
    plan = plan_of(capsys.readouterr().out)
    assert plan["AudioCNN"] == "is trained (epochs_cnn 1 -> 2)"
    assert plan["TextRNN"] == "used again"
    assert plan["Early fusion, RNN"] == "is trained (since AudioCNN is)"
    assert trained == ["cnn", "fusion_rnn", "attention_rnn"]

    after = times_of_checkpoints()
    assert len(after) == 4 + 3
    for name, time_before in times.items():
        assert (after[name] == time_before) == (name == "TextRNN_best.pth")
    for name in trained:
        path = place_of(name)
        previous = path.with_suffix(".previous.pth")
        assert previous.read_bytes() == before[str(path)]
    histories = pd.read_csv(OUTPUT / "histories.csv")
    epochs = histories.loc[histories["system"] == "cnn", "epoch"]
    assert list(epochs) == [1, 2]

    er.main(command)
    assert len(trained) == 3
    assert times_of_checkpoints() == after


def test_going_back_to_the_settings_of_replaced_models_takes_them_back(
        paired, trained, unpublished, undrawn, capsys):
    good, command = contents(OUTPUT), [*paired, "--phase", "fusion"]
    er.main([*command, "--epochs-cnn", "2"])
    longer = contents(OUTPUT)
    del trained[:]
    capsys.readouterr()

    back = "taken back, the training that replaced it is kept"
    for flags, expected in ((command, good), ([*command, "--epochs-cnn", "2"], longer)):
        er.main(flags)
        plan = plan_of(capsys.readouterr().out)
        assert plan == {"AudioCNN": back, "TextRNN": "used again", "Early fusion, RNN": back,
                        "Attention fusion, RNN": back}
        for name in ("cnn", "rnn", "fusion_rnn", "attention_rnn"):
            path = place_of(name)
            assert path.read_bytes() == expected[str(path)]
    assert trained == []
    assert not list(OUTPUT.glob("*.aside.pth"))


def test_a_training_that_replaces_a_longer_one_says_how_to_keep_both(
        worded, trained, unpublished, undrawn, capsys):
    er.main([*worded, "--epochs-rnn", "2"])
    er.main([*worded, "--word-dropout", "0.2"])
    plan = plan_of(capsys.readouterr().out)
    reason = plan["TextRNN"]
    assert "epochs_rnn 2 -> 1" in reason
    assert reason.endswith("in place of a longer training: another --output-dir keeps both)")
    assert trained == ["rnn", "rnn"]


@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_models_change_places_the_one_that_was_asked_for_is_found(
        number, worded, trained, unpublished, undrawn, monkeypatch):
    good = place_of("rnn").read_bytes()
    er.main([*worded, "--epochs-rnn", "2"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(er, "save", lambda *_: None)
        patch.setattr(er, "save_table", lambda *_: None)
        interrupt(patch, Path, "replace", number, after=True)
        er.main(worded)
    er.main(worded)
    assert trained == ["rnn"]
    assert place_of("rnn").read_bytes() == good


def test_changed_sound_features_train_anew_who_hears_and_nobody_else(
        paired, trained, unpublished, undrawn, capsys):
    er.main([*paired, "--phase", "unimodal", "--n-mels", "32"])
    assert trained == ["cnn"]
    plan = plan_of(capsys.readouterr().out)
    assert plan["AudioCNN"] == "is trained (n_mels 64 -> 32)"

    # Early fusions hang on the old AudioCNN: they answer no more, and that is said.
    answering = set(predictions()["system"])
    assert answering == {"cnn", "rnn", "late_rnn", "learned_rnn"}
    assert {"fusion_rnn", "attention_rnn"} <= set(config_of()["not_run"])


def test_other_windows_of_long_clips_train_every_model_anew(trained, unpublished):
    flags = own_corpus(["happy", "sad"], transcript=lambda emotion, *_: f"It is {emotion}.")
    for path in Path("own/sound").glob("*.wav"):
        samples, rate = soundfile.read(path)
        written(path, np.tile(samples, 8), rate)
    command = [*flags, "--run-models", "cnn,rnn"]
    er.main(command)
    er.main([*command, "--clip-seconds", "1.5"])
    assert trained == ["cnn", "rnn", "cnn", "rnn"]

    # Models that answer different windows are no models of one folder.
    er.main([*command, "--run-models", "cnn"])
    assert set(er.checkpoints_together(config())) == {"cnn"}


def test_clips_that_are_cut_into_other_windows_are_other_clips_to_every_model(demo, monkeypatch):
    monkeypatch.setattr(er.SpeechEncoder, "depends_on", lambda cfg: {})
    cfg, clips = demo
    clip = clips[:1]
    mel, samples, _ = clip[er.FEATURES].iloc[0]
    keys = {name: set() for name in ("speech", "rnn")}
    for times in (8, 8, 9):  # longer than one window, from the same file
        sound = {"mel": np.tile(mel, (times, 1)), "samples": np.tile(samples, times)}
        sound["seconds"] = np.arange(len(sound["mel"])) / 100
        longer = clip.assign(**{key: pd.Series([value], clip.index, object) for key, value in sound.items()})
        for name in keys:
            keys[name].add(er.fingerprint_of(cfg, name, longer)["clips"])
    assert [*map(len, keys.values())] == [2, 2]

    # Where log-mels decide which frames are kept, samples differ too.
    for change in ({"n_mels": 32}, {"n_fft": 4096}):
        other = cfg._replace(**change)
        same = [er.fingerprint_of(cfg, name, clip) == er.fingerprint_of(other, name, clip) for name in keys]
        assert same == [False, True]


def test_other_test_views_train_nothing_and_change_who_hears_alone(
        paired, demo_predictions, trained, unpublished, undrawn):
    er.main([*paired, "--test-views", "1"])
    table = predictions()
    assert trained == []
    for name in ("rnn", "fusion_rnn", "attention_rnn"):
        five, one = (of_system(name, each) for each in (demo_predictions, table))
        pd.testing.assert_frame_equal(five, one)
    for name in ("cnn", "late_rnn"):
        five, one = (probabilities_of(name, each) for each in (demo_predictions, table))
        assert not np.allclose(five, one, atol=1e-5)

    checkpoint = checkpoint_of("cnn")
    clips = checkpoint["windows"]["clip"]
    first = checkpoint["log_probs"][0]
    expected = (first / calibration_of()["cnn"]).softmax(dim=1)
    assert np.allclose(probabilities_of("cnn", table, clips), expected, atol=1e-5)


def test_edited_code_trains_anew(worded, edited, trained, unpublished, undrawn, capsys):
    er.main(worded)
    plan = plan_of(capsys.readouterr().out)
    assert plan == {"TextRNN": "is trained (code changed)"}
    assert trained == ["rnn"]
    assert place_of("rnn").with_suffix(".previous.pth").exists()
    assert "trained by other code" not in config_of()["caveats"]
    er.main(worded)
    assert trained == ["rnn"]


def test_models_of_other_code_are_kept_if_asked_and_every_page_says_so(
        worded, edited, trained, undrawn, capsys):
    er.main([*worded, "--reuse-edited"])
    printed = capsys.readouterr().out
    assert trained == []
    assert plan_of(printed) == {"TextRNN": "used again"}

    caveat = "trained by other code"
    assert caveat in printed
    assert caveat in config_of()["caveats"]
    assert caveat in header_of(DOCUMENT)
    for name in ("predictions.csv", "histories.csv"):
        table = pd.read_csv(OUTPUT / name)
        assert table["caveats"].str.contains(caveat).all()


def test_without_source_edits_are_not_noticed_and_the_plan_says_so(
        worded, trained, unpublished, undrawn, monkeypatch, capsys):
    monkeypatch.setattr(er, "code_of", lambda name: "")
    monkeypatch.setattr(er, "definitions", dict)
    er.main(worded)
    assert trained == []
    assert "edits of the code are not noticed" in capsys.readouterr().out.lower()


OLD_LAYOUT = {
    "model": "rnn",
    "spec": {},
    "weights": {},
    "classes": er.EMOTIONS,
    "temperature": 1.5,
    "fingerprint": {"version": 9},
    "marks": [],
    "settings": {},
}


def test_a_checkpoint_of_the_old_layout_is_one_sentence_and_is_kept(
        worded, trained, unpublished, undrawn, capsys):
    path = place_of("rnn")
    torch.save(OLD_LAYOUT, path)
    old = path.read_bytes()
    sentence = r"TextRNN_best.pth was made by an older version.*: train again, the file is kept"
    with pytest.raises(er.UserError, match=f"{sentence}$"):
        er.Predictor(OUTPUT)

    er.main(worded)
    plan = plan_of(capsys.readouterr().out)
    assert re.search(sentence, plan["TextRNN"])
    assert trained == ["rnn"]
    assert path.with_suffix(".previous.pth").read_bytes() == old
    assert checkpoint_of("rnn")["system"] == "rnn"


def test_a_checkpoint_of_another_system_is_trained_anew(
        worded, finished, trained, unpublished, undrawn, capsys):
    shutil.copy(place_of("cnn", finished / OUTPUT), place_of("rnn"))
    er.main(worded)
    assert trained == ["rnn"]
    assert re.search(r"TextRNN_best.pth .*another system", plan_of(capsys.readouterr().out)["TextRNN"])


def test_a_checkpoint_with_the_weights_of_another_version_is_refused(worded):
    checkpoint = checkpoint_of("rnn")
    checkpoint["weights"]["trait_heads.weight"] = torch.zeros(3, 256)
    torch.save(checkpoint, place_of("rnn"))
    foreign = er.read_checkpoint(er.parse_settings(worded), "rnn")
    with pytest.raises(er.UserError, match="TextRNN was made by another version of this script: train with"):
        er.restore(foreign)


@pytest.mark.parametrize("name", ["fusion_rnn", "attention_bert"])
def test_a_fusion_answers_without_one_modality_and_otherwise_than_with_both(name, demo):
    cfg, clips = demo
    model = er.restore(er.read_checkpoint(cfg, name))
    batch = batch_of(model, clips[:8], cfg)
    words = dict(batch)
    sound = {"mel": words.pop("mel")}
    with torch.inference_mode():
        answers = [model(part) for part in (batch, sound, words)]

    for answer in answers:
        assert answer.shape == (8, 8)
        assert answer.isfinite().all()
    for first, second in itertools.combinations(answers, 2):
        assert not torch.allclose(first, second)


# %% End to end: the report alone
def test_report_needs_neither_corpus_nor_models_and_gives_the_same_figures(worded):
    er.main(worded)
    before = contents(OUTPUT)
    shutil.rmtree("archive")
    place_of("rnn").unlink()
    gone = [DOCUMENT, OUTPUT / "metrics.json", OUTPUT / "plots/comparison.png"]
    for path in gone:
        path.unlink()

    er.main(["--demo", "--phase", "report"])
    assert all(path.exists() for path in gone)
    for name in LEFT_BY_A_RUN:
        path = OUTPUT / name
        assert path.read_bytes() == before[str(path)], name
    assert pictures_in(DOCUMENT) == len(PLOTS) + 1


@pytest.mark.parametrize("flag, saved", [
    ("--folds=1", "'0'"),
    ("--epochs-cnn=2", "1"),
    ("--no-demo", "True"),
    ("--sentence-noise=0.5", "0.0"),
    ("--test-views=1", "5"),
])
def test_a_report_refuses_flags_that_contradict_its_figures(flag, saved, copied, unpublished, undrawn):
    before = contents(OUTPUT)
    sentence = f"{flag} contradicts {OUTPUT / 'config.json'}, made with {saved}: leave that flag out or train"
    with pytest.raises(er.UserError, match=re.escape(sentence)):
        er.main([flag, "--phase", "report", "--output-dir", str(OUTPUT)])
    assert contents(OUTPUT) == before


def test_a_report_takes_flags_that_say_what_is_so(copied, unpublished, undrawn):
    before = contents(OUTPUT)
    er.main([*DEMO, "--phase", "report", "--bert-model", f"./{ENCODER}"])
    assert contents(OUTPUT) == before


@pytest.mark.parametrize("name", ["config.json", "predictions.csv", "histories.csv"])
def test_a_report_needs_all_tables_of_its_run(name, copied):
    Path(OUTPUT, name).unlink()
    with pytest.raises(er.UserError, match=rf"{name} is missing or not readable .*--phase all"):
        er.main(["--demo", "--phase", "report"])


@pytest.mark.parametrize("content", [["synthetic"], {}, {"settings": {}}])
def test_foreign_results_end_a_report_in_a_sentence_and_no_run(content, worded, unpublished, undrawn):
    er.main(worded)
    er.save(OUTPUT / "config.json", content)
    with pytest.raises(er.UserError, match=r"config.json is foreign.*--phase all"):
        er.main(["--demo", "--phase", "report"])
    er.main(worded)
    assert config_of()["corpus"] == "RAVDESS"


@pytest.mark.parametrize("key", ["settings", "audit", "calibration", "caveats"])
def test_results_that_lack_something_end_a_report_in_a_sentence(key, copied, undrawn):
    content = config_of()
    del content[key]
    er.save(OUTPUT / "config.json", content)
    with pytest.raises(er.UserError, match=r"config.json is foreign.*--phase all"):
        er.main(["--demo", "--phase", "report"])


def test_results_that_lack_a_setting_of_today_are_one_sentence(copied, unpublished, undrawn):
    config = config_of()
    del config["settings"]["leave_out"]
    (OUTPUT / "config.json").write_text(json.dumps(config))
    with pytest.raises(er.UserError, match=r"config.json is foreign: make it again with --phase all"):
        er.main(["--demo", "--phase", "report", "--leave-out", "calm"])


def test_folders_of_runs_that_trained_nothing_are_no_runs(copied):
    for name in ("fold_0_seed_42", "fold_1_seed_42"):
        (OUTPUT / name).mkdir()
    assert set(er.checkpoints_together(config(output_dir=str(OUTPUT)))) == set(er.TRAINED)


def test_a_report_of_other_data_than_those_beside_it_is_refused(copied, unpublished, undrawn):
    er.main([*DEMO, "--phase", "data", "--folds", "1"])
    with pytest.raises(er.UserError, match=r"not of the data beside it"):
        er.main(["--demo", "--phase", "report"])


def test_a_run_that_was_stopped_while_it_wrote_leaves_no_mix_of_old_and_new(
        worded, unpublished, undrawn, monkeypatch):
    er.main(worded)
    command = [*worded, "--epochs-rnn", "2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "save_table", 4)  # clips, left_out, predictions, and now histories
        er.main(command)
    with pytest.raises(er.UserError, match=r"config.json is missing or not readable"):
        er.main(["--demo", "--phase", "report"])
    er.main(command)
    assert config_of()["settings"]["epochs_rnn"] == 2


def test_without_python_docx_only_the_docx_is_left_out(worded, undrawn, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "docx", None)  # as if it were not installed
        er.main(worded)
    output = capsys.readouterr()
    assert "warning: docx does not load" in output.err
    assert "pip install python-docx, then --phase report makes it" in output.err
    assert "Report: " not in output.out
    assert files_in(OUTPUT) == sorted([*LEFT_BY_A_RUN, *PICKLES, "TextRNN_best.pth"])

    er.main(["--demo", "--phase", "report"])
    assert "TextRNN" in text_of(DOCUMENT)
    assert f"Report: {DOCUMENT}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "text", "load", "found"), [
    ("docx", "import no_exceptions", er.load_docx, "No module named 'no_exceptions'"),
    ("docx", "VERSION = 1", er.load_docx, "docx.py'> is another package of that name"),
    ("whisper", "def create(path): pass", lambda: er.load_whisper("base", "cpu"),
     "whisper.py'> is another package of that name"),
    ("transformers", "", er.load_transformers, "transformers.py'> is another package of that name")])
def test_a_package_that_only_has_the_right_name_is_named_with_what_to_install(
        name, text, load, found, monkeypatch, tmp_path):
    Path(f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(er.UserError, match=re.escape(found)) as stop:
        load()
    package = {"docx": "python-docx", "whisper": "openai-whisper"}.get(name, name)
    assert f"pip install {package}" in str(stop.value)
    sys.modules.pop(name, None)


def test_systems_that_were_left_out_are_shown_as_not_run(finished, undrawn, monkeypatch, capsys):
    monkeypatch.setattr(er, "load_text_encoder", None)  # not needed
    copy_models(finished, "cnn", "rnn", "fusion_rnn", folder=Path("outputs"))
    er.main(["--ravdess-path", str(CORPUS), "--run-models", "cnn,rnn,fusion_rnn", *TINY])
    ran = {"cnn", "rnn", "fusion_rnn", "late_rnn", "learned_rnn"}
    left_out = {name for name in SHOWN if re.search("bert|speech", name)} - {"attention_bert"}
    assert set(predictions("outputs")["system"]) == ran
    assert set(config_of("outputs")["not_run"]) == left_out
    assert capsys.readouterr().out.count(LEFT_OUT) == len(left_out)

    titles = config_of("outputs")["titles"]
    table = table_in("outputs/emotion_recognition_report.docx", "note").set_index("system")
    assert set(table.index) == set(titles.values())
    for name in ran:
        line = table.loc[titles[name]]
        assert line["note"] == "-" != line["test UAR"]
    for name in left_out:
        assert "oracle" not in titles[name]
        line = table.loc[titles[name]]
        assert line["note"] == LEFT_OUT
        assert set(line.drop("note")) == {"-"}


def test_a_random_split_marks_everything(heard, undrawn, capsys):
    er.main([*heard, *TINY, "--split", "random", "--run-models", "rnn", "--phase", "unimodal"])
    caveat = "random split: speakers shared between splits"
    assert caveat in capsys.readouterr().out
    assert caveat in checkpoint_of("rnn", "outputs")["caveats"]
    for name in ("config.json", "audit.json"):
        assert caveat in read_json(Path("outputs", name))["caveats"]
    for name in TABLES:
        table = pd.read_csv(Path("outputs", name), dtype=str)
        assert table["caveats"].str.contains(caveat).all(), name

    path = "outputs/emotion_recognition_report.docx"
    text = text_of(path)
    assert caveat in header_of(path)
    assert f"; {caveat}." in text
    assert "Mind: " in text
    assert "Random split: " in text
    assert "synthetic" not in text


@pytest.fixture
def titled(monkeypatch):
    """The titles of plots by name."""
    found = {}

    def keep(figure, path, *rest, **options):
        SAVE_FIGURE(figure, path, *rest, **options)
        found[Path(path).stem] = figure.get_suptitle()

    monkeypatch.setattr(er, "save_figure", keep)
    return found


@pytest.fixture
def all_titles(copied, titled, monkeypatch):
    """The titles of all plots of the demo, whose pictures are left empty, which takes no time."""
    monkeypatch.setattr(er.plt.Figure, "savefig", lambda self, path, **_: Path(path).touch())
    er.draw_plots(er.read_results(OUTPUT))
    er.main([*DEMO, "--phase", "data"])
    return titled


def test_every_plot_says_what_is_wrong_with_its_figures(all_titles):
    assert len(all_titles) == len(PLOTS) + len(SHOWN)
    for name, title in all_titles.items():
        assert "synthetic demo corpus: the figures mean nothing" in title, name
        silent = ("class_counts", "samples", "confusion_AudioCNN", "confusion_SpeechEncoder",
                  "confusion_LateFusion_Speech", "confusion_LearnedFusion_Speech")
        assert ("oracle" in title) == (name not in silent), name


def test_titles_of_plots_name_corpus_split_clips_and_speakers(all_titles):
    of_data = {"class_counts": "RAVDESS, fold 0, 96 clips", "samples": "RAVDESS, fold 0, training clips"}
    for name, title in all_titles.items():
        assert of_data.get(name, "RAVDESS, fold 0, 32 test clips, 2 speakers") in title, name
    assert "Test UAR in % with 95 % interval" in all_titles["comparison"]
    assert all_titles["confusion_AudioCNN"].startswith("AudioCNN: test UAR ")


@pytest.fixture
def drawn(monkeypatch):
    """The figures of plots by name, still open; none is saved."""
    found = {}

    def keep(figure, path, *_, **__):
        found[Path(path).stem] = figure

    monkeypatch.setattr(er, "save_figure", keep)
    yield found
    er.plt.close("all")


def test_training_curves_have_whole_epochs_and_accuracies_in_percent(copied, drawn):
    er.plot_curves(er.read_results(OUTPUT))
    axes = drawn["training_curves"].axes
    assert len(axes) == 2 * len(IN_EPOCHS)
    highest = 0
    for axis in axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
        if "accuracy" in axis.get_title():
            highest = max(highest, *(line.get_ydata().max() for line in axis.lines if len(line.get_ydata())))
    assert 1 < highest <= 100


def test_reliability_shows_no_bin_of_fewer_than_five_clips(copied, drawn):
    results = er.read_results(OUTPUT)
    er.plot_reliability(results)
    axes = {axis.get_title(): axis for axis in drawn["reliability"].axes}
    bins = er.reliability(results.test, results.classes, ["system"])
    for name, part in bins.groupby("system"):
        kept = part[part["clips"] >= 5].sort_values("confidence")
        shown = []
        if results.titles[name] in axes:
            shown = axes[results.titles[name]].lines[0].get_xydata()
        assert np.allclose(np.reshape(shown, (-1, 2)), 100 * kept[["confidence", "right"]])


def test_coverage_withholds_the_least_confident_answers_first(copied, drawn):
    results = er.read_results(OUTPUT)
    er.plot_coverage(results)
    axis, = drawn["coverage"].axes
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    assert list(lines) == list(results.titles.values())
    for name, part in results.test.groupby("system"):
        order = np.argsort(-part[er.EMOTIONS].max(axis=1).to_numpy(), kind="stable")
        points = dict(lines[results.titles[name]].round(6).tolist())
        assert list(points)[::6] == [10, 40, 70, 100]
        assert points[100] == pytest.approx(100 * uar(part))
        confidence = part[er.EMOTIONS].max(axis=1).iloc[order]
        if confidence.iloc[15] > confidence.iloc[16]:  # no tie
            assert points[50] == pytest.approx(100 * uar(part.iloc[order[:16]]))


def test_the_comparison_sets_sound_apart_from_oracle_text(copied, drawn):
    results = er.read_results(OUTPUT)
    er.plot_comparison(results)
    axis = drawn["comparison"].axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    colors = dict(zip(names, (bar.get_facecolor() for bar in axis.patches)))
    assert names == list(results.titles.values())
    assert axis.yaxis_inverted()
    for title, color in colors.items():
        assert (color == colors["AudioCNN"]) == ("oracle" not in title)


def test_emotion_over_time_is_titled_and_its_legend_has_the_order_of_the_stack(copied, titled, monkeypatch):
    predictor = er.Predictor(OUTPUT)
    figures = []
    keep = er.save_figure
    monkeypatch.setattr(er, "save_figure", lambda figure, *rest, **options: (
        figures.append(figure), keep(figure, *rest, **options)))
    samples = np.tile(speech(), 8)
    course = predictor.predict_over_time(samples, RATE)
    er.save_course("talk.wav", course, predictor, "out")
    caveat = "synthetic demo corpus: the figures mean nothing"
    assert next(iter(titled.values())) == f"Emotion over time, {TITLES[predictor.first]}: talk.wav\n{caveat}"
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == predictor.classes[::-1]


def test_the_hardware_of_one_thread_is_singular(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert er.versions("cpu")["hardware"].endswith(", 1 thread")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert er.versions("cpu")["hardware"].endswith(", 2 threads")


def test_spectrograms_name_kilohertz_decibels_and_clips(demo, drawn):
    cfg, clips = demo
    er.plot_samples(clips, "RAVDESS", cfg, ())
    axis, scale = drawn["samples"].axes
    drawn["samples"].canvas.draw()
    assert scale.get_ylabel() == "dB"
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert all(tick.endswith(" kHz") for tick in ticks)
    names = [label.get_text().split("\n") for label in axis.get_xticklabels()]
    assert [emotion for emotion, _ in names] == er.EMOTIONS
    assert {clip for _, clip in names} <= set(clips["clip"])


def test_runs_without_words_say_nothing_of_sentences(finished, titled, capsys):
    copy_models(finished, "cnn", folder=OUTPUT)
    er.main([*DEMO, "--run-models", "cnn"])
    assert config_of()["oracles"] == []
    shown = [text_of(DOCUMENT), (OUTPUT / "results.tex").read_text(encoding="utf-8"), *titled.values()]
    for text in shown:
        assert not re.search("oracle|simulated sentences|Words:|word pieces", text)
    assert "UAR of all systems" in text_of(DOCUMENT)
    with pytest.raises(AssertionError):
        table_in(DOCUMENT, "against")


def test_an_interrupted_write_leaves_the_old_file():
    er.save(Path("table.json"), {"old": 1})
    with pytest.raises(KeyboardInterrupt), er.replacing("table.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(".").keys() == {"table.json"}
    assert read_json("table.json") == {"old": 1}


# %% End to end: the demo and the command line
def test_demo_never_writes_into_a_folder_that_the_user_named(worded, undrawn):
    touch("own", "config.json", "vocab.txt", "pytorch_model.bin")
    before = contents("own")
    er.main([*DEMO, "--phase", "data", "--bert-model", "own"])
    assert contents("own") == before


def test_demo_leaves_a_real_run_alone(worded, unpublished, undrawn):
    er.main(worded)
    content = config_of()
    content["settings"]["demo"] = False
    er.save(OUTPUT / "config.json", content)
    before = contents("outputs")
    with pytest.raises(er.UserError, match=r"outputs.demo holds a real run: name another --output-dir"):
        er.main(worded)
    assert contents("outputs") == before


def test_the_command_line_runs_the_demo_and_its_voices_are_learned_in_eight_epochs():
    done = run_script("--demo", "--device", "cpu", "--run-models", "cnn")
    assert done.returncode == 0, done.stderr
    assert config_of()["settings"]["epochs_cnn"] == 8
    assert figures()["cnn"]["uar"] > 0.5  # chance is 0.125
    assert "384 clips" in read_json(OUTPUT / "audit.json")["audit"][0]
    assert DOCUMENT.exists()
    # Who is validation in no fold, by the folds of the literature.
    unseen = config_of()["unseen_actors"]
    assert unseen == [4, 7, 9, 12, 13, 15, 16, 18, 19, 20, 21, 22, 23, 24]
    assert "Warning" not in done.stderr


def test_one_seed_gives_the_same_weights_in_a_new_process(heard, output, tmp_path):
    folder = tmp_path / "outputs"
    flags = [*heard, *TINY, "--phase", "unimodal", "--run-models", "cnn", "--output-dir", str(folder)]
    process = PROCESSES.Process(target=er.main, args=(flags,))
    process.start()
    process.join()
    assert process.exitcode == 0
    here = checkpoint_of("cnn", output)
    there = checkpoint_of("cnn", folder)
    for key, tensor in here["weights"].items():
        assert torch.equal(tensor, there["weights"][key]), key
    assert torch.equal(here["log_probs"], there["log_probs"])


@pytest.mark.parametrize("name", ["cnn", "rnn"])
def test_one_seed_gives_the_same_weights_and_another_seed_others(name, output, crossed):
    weights = []
    for folder in (output, crossed / "fold_0_seed_42", crossed / "fold_0_seed_43"):
        checkpoint = checkpoint_of(name, folder)
        weights.append(checkpoint["weights"]["head.weight"])
    first, same, other = weights
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# %% Cross-validation
RUNS = [(0, 42), (0, 43), (1, 42), (1, 43)]
CROSSED = ["--run-models", "cnn,rnn", "--folds", "0,1", "--runs", "2", "--test-views", "2", *TINY]
COMPARED = {"cnn", "cnn_ensemble", "rnn", "late_rnn", "learned_rnn"}


@pytest.fixture(scope="session")
def crossed(finished, tmp_path_factory):
    """The output of AudioCNN and TextRNN trained on two folds with two seeds."""
    command = ["--ravdess-path", str(finished / CORPUS), *CROSSED]
    return filled(tmp_path_factory, "crossed", lambda patch: er.main(command)) / "outputs"


@pytest.fixture
def crossed_copy(crossed):
    """The current folder holds a copy of the cross-validation, as outputs."""
    shutil.copytree(crossed, "outputs")


def test_every_fold_and_seed_has_its_own_folder(crossed):
    folders = {path.name for path in crossed.glob("fold_*")}
    assert folders == {"fold_0_seed_42", "fold_0_seed_43", "fold_1_seed_42", "fold_1_seed_43"}
    for folder in folders:
        names = files_in(crossed / folder)
        assert names == ["AudioCNN_best.pth", "TextRNN_best.pth", "clips.csv", PICKLES[1]]
    assert not list(crossed.glob("*.pth"))


def test_no_figure_of_a_table_is_nan(crossed):
    table = er.table_of(er.read_results(crossed))
    assert "AudioCNN, ensemble" in set(table["system"])
    assert "nan" not in table.to_string()


def test_cross_validation_pools_all_runs(crossed):
    table = predictions(crossed)
    assert set(table["system"]) == COMPARED
    rnn = table[table["system"] == "rnn"]
    runs = rnn[["fold", "seed"]].drop_duplicates()
    assert sorted(map(tuple, runs.to_numpy())) == RUNS

    lines = figures(crossed)
    line = lines["rnn"]
    test = rnn[rnn["split"] == "test"]
    assert line["clips"] == len(test)
    assert line["accuracy"] == pytest.approx(right(test).mean())
    single, joined = (lines[name]["clips"] for name in ("cnn", "cnn_ensemble"))
    assert single == 2 * joined


def test_the_headline_is_the_mean_of_the_runs(crossed):
    lines = pd.DataFrame(read_json(crossed / "metrics.json"))
    lines = lines.query("by == 'fold seed' and split == 'test'")
    summary = er.summarize(er.read_results(crossed))
    assert set(summary.index) == COMPARED
    for name, line in summary.iterrows():
        uars = lines.loc[lines["system"] == name, "uar"]
        assert line["uar"] == pytest.approx(uars.mean())
        assert line["low"] <= line["high"]


@pytest.mark.parametrize("fold", [0, 1])
def test_an_ensemble_is_the_calibrated_mean_of_the_log_probabilities_of_the_seeds(fold, crossed):
    table = predictions(crossed)
    table = table[table["fold"] == fold]
    joined = of_system("cnn_ensemble", table)
    logs = np.log(probabilities_of("cnn", table))
    logs = logs.groupby("clip").mean()
    assert joined.index.is_unique
    assert set(joined.index) == set(logs.index)

    logits = torch.tensor(logs.loc[joined.index].to_numpy())
    held_out = joined["split"].to_numpy() == "validation"
    labels = joined["emotion"].map(er.EMOTIONS.index)
    labels = torch.tensor(labels.to_numpy())
    temperature = er.fit_temperature(logits[held_out], labels[held_out])
    expected = (logits / temperature).softmax(dim=1)
    assert np.allclose(joined[er.EMOTIONS], expected, atol=1e-4)


def test_a_cross_validation_is_used_again_and_its_command_repeats_it(
        crossed_copy, heard, trained, unpublished, undrawn):
    before = contents("outputs")
    er.main([*heard, *CROSSED])
    assert trained == []
    assert contents("outputs") == before
    saved, again = settings_again("outputs")
    assert saved == again
    assert saved["folds"] == "0,1"
    assert saved["runs"] == 2
    assert saved["test_views"] == 2


def test_a_system_that_one_run_lacks_is_compared_in_none(
        crossed_copy, heard, trained, unpublished, undrawn):
    place_of("rnn", "outputs/fold_1_seed_43").unlink()
    er.main([*heard, *CROSSED, "--run-models", "cnn"])
    assert trained == []
    assert set(predictions("outputs")["system"]) == {"cnn", "cnn_ensemble"}
    assert {"rnn", "late_rnn", "learned_rnn"} <= set(config_of("outputs")["not_run"])


def test_the_report_of_a_cross_validation_has_paired_differences_and_every_fold(crossed):
    path = crossed / "emotion_recognition_report.docx"
    assert "Paired differences in pooled UAR" in text_of(path)
    pairs = table_in(path, "against")
    assert len(pairs) == math.comb(len(COMPARED), 2)
    for texts in pairs[["low", "difference", "high"]].to_numpy():
        for text in texts:
            assert re.fullmatch(r"[+-]\d+\.\d", text)
        assert list(map(float, texts)) == sorted(map(float, texts))

    assert {"SD folds", "SD seeds"} <= set(table_in(path, "test UAR"))
    assert pictures_in(path) == len(list(crossed.glob("plots/*.png")))


def test_a_report_of_a_cross_validation_needs_nothing_but_its_tables(
        crossed_copy, finished, unpublished, undrawn, capsys):
    metrics = Path("outputs/metrics.json")
    before = metrics.read_bytes()
    metrics.unlink()
    for folder in Path("outputs").glob("fold_*"):
        shutil.rmtree(folder)
    er.main(["--phase", "report", "--ravdess-path", str(finished / "archive/../archive/demo/corpus")])
    assert metrics.read_bytes() == before
    assert "AudioCNN, ensemble" in capsys.readouterr().out
    with pytest.raises(er.UserError, match=r"--folds=0 contradicts .*config\.json, made with '0,1'"):
        er.main(["--phase", "report", "--folds", "0"])


def test_a_report_has_no_plot_of_an_earlier_run(worded, crossed):
    shutil.copytree(crossed / "plots", OUTPUT / "plots")
    er.main(worded)
    assert pictures_in(DOCUMENT) == len(PLOTS) + 1
    assert files_in(OUTPUT) == left_by("rnn")


# %% Figures and the bootstrap
def answers(seed, clips=400, actors=10, noise=1.0):
    """A table of predictions that are random and mostly right; every other actor is test."""
    rng = np.random.default_rng(seed)
    row = np.arange(clips)
    logits = rng.normal(size=(clips, 8)) * noise
    logits += 2 * np.eye(8)[row % 8]
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    table = pd.DataFrame(probabilities.numpy(), columns=er.EMOTIONS)
    predicted = table.idxmax(axis=1)
    return table.assign(
        system="cnn",
        fold=0,
        seed=seed,
        split=np.where(row // 8 % 2, "test", "validation"),
        clip=[f"{index:04}" for index in row],
        actor=row // 8 % actors,
        emotion=[er.EMOTIONS[index % 8] for index in row],
        transcript=[f"sentence {index % 32}" for index in row],
        predicted=predicted)


def results_of(*tables, **config):
    """Results of tables of predictions, with as much of config.json as figures need."""
    usual = {
        "classes": er.EMOTIONS,
        "titles": {name: system.title for name, system in er.SYSTEMS.items()},
        "oracles": [],
        "unseen_actors": [],
        "not_run": {},
        "caveats": ["made up", "for a test"],
        "calibration": {},
    }
    table = pd.concat(tables, ignore_index=True)
    return er.Results(Path("outputs"), usual | config, table, pd.DataFrame())


def width(results, name):
    """The width of the interval of a system."""
    line = er.summarize(results).loc[name]
    return line["high"] - line["low"]


def test_a_cluster_is_drawn_as_a_whole_and_as_many_as_there_are():
    clusters = np.array([7, 7, 3, 3, 3, 5])
    weights = er.resampled(clusters, clusters, draws=500)
    seven, again, three, _, other, five = weights.T
    assert (seven == again).all()
    assert (three == other).all()
    assert (seven + three + five == 3).all()
    assert weights.max() == 3
    for column in (seven, three, five):
        assert column.mean() == pytest.approx(1, abs=0.15)


def test_tables_with_the_same_names_share_their_draws():
    few = np.array(["b", "d"])
    every = np.array(["d", "a", "c", "b"])
    b, d = er.resampled(few, every).T
    d_again, _, _, b_again = er.resampled(every, every).T
    assert (b == b_again).all()
    assert (d == d_again).all()


def test_an_emotion_that_is_not_drawn_counts_for_nothing():
    table = answers(1)
    table["predicted"] = table["emotion"]
    only_sad = (table["emotion"] == "sad").to_numpy()
    weights = only_sad[None].astype(np.float32)
    assert er.weighted_uar(weights, table, er.EMOTIONS) == [1.0]


def test_a_weighted_uar_is_that_of_clips_which_are_there_so_often():
    table = answers(1)
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 4, (3, len(table)))
    found = er.weighted_uar(weights, table, er.EMOTIONS)
    for row, value in zip(weights, found):
        repeated = table.loc[np.repeat(table.index, row)]
        assert value == pytest.approx(uar(repeated))


def test_the_interval_holds_the_figure_and_is_wide_when_actors_differ():
    table = answers(3, clips=1600, actors=20).assign(split="test")
    spread = pd.Series(table.index // 160 % 2 == 0)
    by_actor = table["actor"] < 10
    widths = []
    for perfect in (spread, by_actor):  # as many right answers in both
        predicted = table["emotion"].where(perfect, table["predicted"])
        mixed = table.assign(predicted=predicted)
        summary = er.summarize(results_of(mixed)).loc["cnn"]
        assert summary["low"] < uar(mixed) < summary["high"]
        widths.append(summary["high"] - summary["low"])
    assert widths[1] > 1.5 * widths[0]


def test_clips_without_a_named_speaker_are_drawn_one_by_one():
    table = answers(3)
    single = table.assign(actor=table["clip"])
    unnamed = table.assign(actor="")
    expected = er.summarize(results_of(single))
    pd.testing.assert_frame_equal(er.summarize(results_of(unnamed)), expected)


def test_systems_that_read_simulated_sentences_draw_sentences_too():
    table = answers(3)
    number = table["transcript"].str[9:].astype(int)
    predicted = table["emotion"].where(number < 24, "sad")  # a sentence misleads, whoever speaks it
    tables = [table.assign(predicted=predicted, system=name) for name in ("cnn", "rnn")]
    plain = results_of(*tables)
    oracle = results_of(*tables, oracles=["rnn"])
    assert width(oracle, "cnn") == width(plain, "cnn")
    assert width(oracle, "rnn") > 2 * width(plain, "rnn")


def test_differences_are_paired():
    table = answers(3)
    predicted = table["predicted"].copy()
    predicted[::7] = table["emotion"][::7]
    better = table.assign(system="rnn", predicted=predicted)
    same = table.assign(system="bert")
    results = results_of(table, better, same)
    draws = er.bootstrap(results)

    # Two systems that say the same differ by nothing in every draw, however uncertain each of them is.
    assert (draws["bert"] == draws["cnn"]).all()
    assert draws["cnn"].std() > 0.01
    gaps = draws["rnn"] - draws["cnn"]
    assert (gaps >= 0).all()
    low, high = gaps.quantile([0.025, 0.975])
    assert high - low < width(results, "cnn")


def test_figures_of_a_system_are_those_of_its_runs_and_of_all_clips():
    tables = [answers(1), answers(2).assign(fold=1)]
    train = tables[0].assign(split="train")
    results = results_of(*tables, train, unseen_actors=[1, 3])
    summary = er.summarize(results).loc["cnn"]
    single = [uar(of_system("cnn", table, "test")) for table in tables]
    assert summary["uar"] == pytest.approx(np.mean(single))
    assert summary["sd_folds"] == pytest.approx(np.std(single, ddof=1))
    assert summary["train_accuracy"] == pytest.approx(right(train).mean())

    test = results.test
    unseen = test[test["actor"].isin([1, 3])]
    assert summary["unseen"] == pytest.approx(uar(unseen))
    assert summary["accuracy"] == pytest.approx(right(test).mean())


def test_figures_need_no_actor_who_is_unseen():
    summary = er.summarize(results_of(answers(1)))
    assert math.isnan(summary.loc["cnn", "unseen"])
    assert summary.loc["cnn", "uar"] > 0.5


def counted_case():
    """Nine predictions, seven of them right, each with a confidence of 0.72."""
    found = [0, 1, 2, 3, 4, 5, 6, 6, 1]
    true = [0, 1, 2, 3, 4, 5, 6, 7, 0]
    probabilities = np.full((9, 8), 0.04)
    probabilities[range(9), found] = 0.72
    table = pd.DataFrame(probabilities, columns=er.EMOTIONS)
    table["predicted"] = [er.EMOTIONS[index] for index in found]
    table["emotion"] = [er.EMOTIONS[index] for index in true]
    return table


def test_scores_are_of_the_emotions_that_occur():
    table = counted_case().query("emotion == predicted and emotion == 'sad'")
    figures = scores_of(table)
    assert figures["uar"] == figures["macro_f1"] == figures["accuracy"] == 1


def test_a_confusion_matrix_has_a_row_per_true_emotion():
    counts = er.confusion(counted_case(), er.EMOTIONS)
    assert counts.shape == (8, 8)
    assert list(counts.loc["surprised"]) == [0, 0, 0, 0, 0, 0, 1, 0]
    assert list(counts.loc["neutral"]) == [1, 1, 0, 0, 0, 0, 0, 0]


def ece_if_perfect(*tables):
    """The ECE that chance alone gives to calibrated answers like those in tables."""
    table = pd.concat(tables, ignore_index=True)
    return scores_of(table)["ece_if_perfect"]


def test_the_ece_of_calibrated_clips_is_what_chance_gives():
    table = answers(4, clips=800)
    rng = np.random.default_rng(5)
    edges = table[er.EMOTIONS].to_numpy().cumsum(axis=1)
    errors = []
    for _ in range(200):  # labels that follow the probabilities
        places = rng.random((800, 1))
        labels = (edges > places).argmax(axis=1)
        emotions = [er.EMOTIONS[label] for label in labels]
        errors.append(scores_of(table.assign(emotion=emotions))["ece"])
    expected = np.mean(errors)
    assert ece_if_perfect(table) == pytest.approx(expected, rel=0.1)


def test_the_ece_of_calibrated_clips_shrinks_with_their_number():
    table = answers(4)
    few = ece_if_perfect(table)
    many = ece_if_perfect(*[table] * 16)
    assert 0 < many < few / 3
    sure = table.assign(**dict.fromkeys(er.EMOTIONS, 0.0))
    sure["sad"] = 1.0
    assert ece_if_perfect(sure) < 1e-6


# %% The study, archive/study.py
STUDY = SCRIPT.parent / "archive/study.py"
STUDY_FLAGS = [*TINY, "--demo", "--run-models", "cnn,rnn,fusion_rnn"]
STUDIED = ["cnn", "rnn", "fusion_rnn", "attention_rnn", "late_rnn", "learned_rnn"]
SILENT, NOISY = OUTPUT / "noise_0.0/demo", OUTPUT / "noise_1.0/demo"


@pytest.fixture(scope="session")
def study():
    return companion(STUDY)


@pytest.fixture
def studied(study, finished, trained, unpublished, undrawn, monkeypatch, capsys):
    """A study of two levels of noise has run, the first one with the models of the finished demo."""
    def save_figure(figure, path, caveats, *_, **__):
        if path.name == "study.png":
            SAVE_FIGURE(figure, path, caveats)
        er.plt.close(figure)

    monkeypatch.setattr(er, "save_figure", save_figure)
    monkeypatch.setattr(study, "LEVELS", (0.0, 1.0))
    copy_models(finished, "cnn", "rnn", "fusion_rnn", "attention_rnn", folder=SILENT)
    study.main(["--", *STUDY_FLAGS])


def test_the_study_trains_the_words_anew_at_every_noise_and_sound_once(study, studied, trained, capsys):
    assert trained == ["rnn", "fusion_rnn", "attention_rnn"]
    first, other = (place_of("cnn", folder) for folder in (SILENT, NOISY))
    assert first.read_bytes() == other.read_bytes()
    assert "text: simulated sentences (oracle, noise 1.0)" in config_of(NOISY)["caveats"]
    printed = capsys.readouterr().out
    assert "Attention fusion, RNN" in printed.split("differences in %")[1]

    table = pd.read_csv(OUTPUT / "study.csv")
    assert list(table["system"]) == STUDIED * 2
    assert set(table["text_model"]) == {"TextRNN"}
    for noise, folder in ((0.0, SILENT), (1.0, NOISY)):
        part = table[table["noise"] == noise].set_index("system")
        results = er.read_results(folder)
        expected = er.summarize(results).loc[STUDIED, "uar"]
        assert np.allclose(part["uar"], expected, atol=1e-6)
        assert (part["text_uar"] == part.loc["rnn", "uar"]).all()
    assert Path(OUTPUT, "study.png").stat().st_size > 5000

    before = contents(OUTPUT)
    study.main(STUDY_FLAGS)
    assert len(trained) == 3
    assert contents(OUTPUT) == before


def test_the_study_shares_the_sound_of_every_fold_and_seed(study, crossed):
    cfg = er.parse_settings(CROSSED)
    study.share_audio(cfg._replace(output_dir=str(crossed)), cfg._replace(output_dir="noisy"))
    for fold, seed in RUNS:
        name = f"fold_{fold}_seed_{seed}"
        assert files_in(f"noisy/{name}") == ["AudioCNN_best.pth"]
        copied_to = place_of("cnn", f"noisy/{name}")
        assert copied_to.read_bytes() == place_of("cnn", crossed / name).read_bytes()


@pytest.fixture
def compared(study):
    """(results of two text models, the table that the study makes of them by text model and system)."""
    names = "cnn", "rnn", "bert", "fusion_rnn", "late_bert"
    tables = []
    for seed, name in enumerate(names):
        table = answers(seed)
        tables.append(table.assign(system=name, seed=42))
    results = results_of(*tables, oracles=names[1:])
    return results, study.compare(results, 0.5)


def test_the_study_compares_every_system_with_sound_and_with_its_words(compared):
    results, table = compared
    table = table.set_index(["text_model", "system"])
    assert list(table.index) == [
        ("TextRNN", "cnn"),
        ("TextRNN", "rnn"),
        ("TextRNN", "fusion_rnn"),
        ("TextBERT", "cnn"),
        ("TextBERT", "bert"),
        ("TextBERT", "late_bert"),
    ]
    assert set(table["noise"]) == {0.5}
    assert set(table["chance"]) == {1 / 8}
    assert set(table["caveats"]) == {"made up; for a test"}

    draws, test = er.bootstrap(results), results.test
    line = table.loc["TextRNN", "fusion_rnn"]
    fused = uar(of_system("fusion_rnn", test))
    for key, other in (("minus_audio", "cnn"), ("minus_text", "rnn")):
        gap = fused - uar(of_system(other, test))
        gaps = draws["fusion_rnn"] - draws[other]
        low, high = gaps.quantile([0.025, 0.975])
        found = line[[key, f"{key}_low", f"{key}_high"]]
        assert list(found) == pytest.approx([gap, low, high])
    assert table.loc["TextBERT", "bert"]["minus_text"] == 0
    assert table.loc["TextBERT", "cnn"]["minus_audio"] == 0


def test_the_study_draws_a_panel_per_text_model_with_chance_in_it(study, compared, monkeypatch):
    drawn = []
    monkeypatch.setattr(er, "save_figure", lambda *what: drawn.append(what))
    _, table = compared
    study.draw(table, Path("study.png"))
    ((figure, path, caveats),) = drawn
    assert path == Path("study.png")
    assert caveats == ["made up", "for a test"]

    labels = {}
    for axis in figure.axes:
        texts = axis.get_legend().get_texts()
        labels[axis.get_title()] = {text.get_text() for text in texts}
    assert labels == {
        "TextRNN": {"AudioCNN", "TextRNN", "Early fusion, RNN", "chance"},
        "TextBERT": {"AudioCNN", "TextBERT", "Late fusion, BERT", "chance"},
    }
    er.plt.close(figure)


NO_SENTENCES = "the study needs simulated sentences: leave out --no-use-simulated-sentences, and take "
NO_PAIR = "the study compares words with sound: add cnn and rnn or bert to --run-models"
REFUSED = {
    "--fusion=concat": "--fusion=concat is decided by the study: leave it out",
    "--sentence-noise=0.3": "--sentence-noise=0.3 is decided by the study: leave it out",
    "--phase=data": "--phase=data is decided by the study: leave it out",
    "--no-use-simulated-sentences": NO_SENTENCES,
    "--manifest=m.csv": NO_SENTENCES,
    "--run-models=rnn,bert": NO_PAIR,
    "--run-models=cnn": NO_PAIR,
    "--epoch-cnn=3": "unrecognized arguments: --epoch-cnn=3",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_the_study_refuses_flags_that_make_none(flag, study, trained):
    header = "path,emotion,speaker,transcript"
    manifest("a.wav,happy,1,so", "b.wav,sad,2,no", "c.wav,happy,3,yes", header=header)
    before = contents(".")
    with pytest.raises(er.UserError, match=REFUSED[flag]):
        study.main(["--", flag])
    assert trained == []
    assert contents(".") == before


def test_an_error_ends_the_study_with_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--", "--ravdess-path", "nowhere"])
    source = compile(STUDY.read_text(encoding="utf-8"), str(STUDY), "exec")
    with pytest.raises(SystemExit) as stop:
        exec(source, {"__name__": "__main__", "__file__": str(STUDY)})
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match("error: .*nowhere", line)


# %% Answers to changed recordings, archive/robustness.py
ROBUSTNESS = SCRIPT.parent / "archive/robustness.py"


@pytest.fixture(scope="session")
def robustness():
    return companion(ROBUSTNESS)


@pytest.fixture
def altered(robustness):
    """Changes samples at 48 kHz, by the name of the change."""
    return lambda name, samples: robustness.CHANGES[name](samples, 48000)


def decibels(ratio):
    return 20 * np.log10(ratio)


def below(added, samples):
    """How many dB of mean power something lies below samples."""
    return decibels(np.linalg.norm(samples) / np.linalg.norm(added))


def level_at(samples, frequency, rate=48000):
    """The amplitude of samples within 2 % of a frequency in Hz."""
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    near = abs(frequencies - frequency) < 0.02 * frequency
    power = abs(np.fft.rfft(samples)[near]) ** 2
    return 2 * math.sqrt(power.sum()) / len(samples)


def kept(altered, name, pitch):
    """The dB by which a change makes a tone of a pitch in Hz louder."""
    samples = tone(2, 48000, pitch)
    return decibels(level_at(altered(name, samples), pitch) / level_at(samples, pitch))


def test_robustness_tones_and_noises_have_the_level_in_their_name(altered):
    samples = 0.3 * speech(48000)
    for name, frequency, level in (("tone, 5000 Hz at -40 dB", 5000, -40), ("hum, 50 Hz at -20 dB", 50, -20)):
        added = altered(name, samples) - samples
        assert decibels(abs(added).max() / abs(samples).max()) == pytest.approx(level, abs=0.05)
        assert level_at(added, frequency) == pytest.approx(abs(added).max(), rel=0.02)

    for level in (30, 20, 10, 0):
        white = altered(f"white noise, {level} dB", samples) - samples
        assert below(white, samples) == pytest.approx(level, abs=0.01)
        assert level_at(white, 8000) / level_at(white, 500) == pytest.approx(4, rel=0.2)
        again = altered(f"white noise, {level} dB", samples.copy()) - samples
        assert (white == again).all()
    pink = altered("pink noise, 10 dB", samples) - samples
    assert below(pink, samples) == pytest.approx(10, abs=0.01)
    assert level_at(pink, 8000) / level_at(pink, 500) == pytest.approx(1, rel=0.2)
    power = abs(np.fft.rfft(pink)) ** 2
    unheard = np.fft.rfftfreq(len(pink), 1 / 48000) < 20
    assert power[unheard].sum() < 0.2 * power.sum()


def test_robustness_filters_and_levels_do_what_their_names_say(altered):
    for name, passes, stops in (
            ("high-pass, 50 Hz", (100, 1000, 20000), (20,)),
            ("low-pass, 7500 Hz", (30, 1000, 6000), (12000,)),
            ("telephone, 300-3400 Hz", (500, 1000, 3000), (100, 8000))):
        for pitch in passes:
            assert abs(kept(altered, name, pitch)) < 1.5
        for pitch in stops:
            assert kept(altered, name, pitch) < -12
    assert kept(altered, "gain, -6 dB", 440) == pytest.approx(-6)
    assert kept(altered, "gain, -20 dB", 440) == pytest.approx(-20)

    samples = speech(48000)
    small = altered("-40 dB in 16 bits", samples)
    assert abs(small - samples / 100).max() <= 0.5001 / 32768
    assert (small * 32768 == np.round(small * 32768)).all()
    clipped = altered("clipping, loudest 0.3 %", samples)
    assert (clipped != samples).mean() == pytest.approx(0.003, abs=0.0005)
    assert abs(clipped).max() < abs(samples).max()
    assert (altered("none", samples) == samples).all()


def test_robustness_filters_take_a_file_that_ends_below_them(robustness):
    samples = tone(1, 8000)
    heard = robustness.CHANGES["low-pass, 7500 Hz"](samples, 8000)
    assert level_at(heard, 440, 8000) == pytest.approx(0.5, rel=0.02)


def test_robustness_lengths_are_what_their_names_say(altered):
    samples = speech(48000)
    silence = np.zeros(24000)
    assert (altered("zeros before, 0.5 s", samples) == np.append(silence, samples)).all()
    assert (altered("zeros after, 0.5 s", samples) == np.append(samples, silence)).all()
    assert (altered("cropped beginning, 50 ms", samples) == samples[2400:]).all()
    assert (altered("cropped end, 50 ms", samples) == samples[:-2400]).all()
    assert len(altered("8 kHz", samples)) == pytest.approx(len(samples) / 6, abs=1)

    for speed in (0.9, 1.1):
        fast = altered(f"speed {speed}", tone(2, 48000))
        assert len(fast) == pytest.approx(96000 / speed, abs=1)
        assert level_at(fast, 440 * speed) == pytest.approx(0.5, rel=0.02)


def robust(printed, changes):
    """The first line of what was printed, {title: {change: numbers of its row}}, the lines about sexes."""
    first, *blocks = printed.strip().split("\n\n")
    tables, sexes = {}, []
    for block in blocks:
        title, header, *lines, last = block.splitlines()
        assert header.split() == ["unchanged", "uar", "ece", "ece_if_perfect", "no", "speech"]
        tables[title] = {}
        for change, line in zip(changes, lines, strict=True):
            assert line.startswith(f"{change} ")
            numbers = re.findall(r"[0-9.]+", line.removeprefix(change))
            tables[title][change] = [float(number) for number in numbers]
        sexes.append(last)
    return first, tables, sexes


def test_robustness_asks_every_model_that_hears_after_every_change(robustness, copied, capsys):
    robustness.main([str(OUTPUT), str(CORPUS), "--clips", "4"])
    first, tables, sexes = robust(capsys.readouterr().out, robustness.CHANGES)
    assert first.startswith("4 clips; models trained on 0 of them; ")
    assert "synthetic demo corpus: the figures mean nothing" in first
    hearing = [er.SYSTEMS[name].title for name in SHOWN if not er.reads_words(name)]
    assert list(tables) == hearing
    for rows in tables.values():
        assert rows["none"][0] == 100
    for line in sexes:
        assert re.fullmatch(r"UAR: female \S+ %, male \S+ %; gap \S+ %, by chance up to \S+ % .*", line)


@pytest.fixture
def few_changes(robustness, monkeypatch):
    """Recordings are changed in three ways of many, one of which leaves nothing to be heard."""
    names = "none", "clipping, loudest 0.3 %", "white noise, 0 dB"
    few = {name: robustness.CHANGES[name] for name in names}
    monkeypatch.setattr(robustness, "CHANGES", few)


def answer_always(monkeypatch, number):
    """Let models give a window the emotion of a number, whatever they hear; nothing if it is silent."""
    def infer(model, windows, cfg, device):
        logits = torch.zeros(len(model.views), len(windows), 8)
        logits[..., number] = 3
        return logits.log_softmax(dim=2)

    monkeypatch.setattr(er, "infer", infer)


def test_robustness_of_who_always_answers_the_same_is_perfect_and_its_uar_chance(
        robustness, few_changes, copied, monkeypatch, capsys):
    answer_always(monkeypatch, 4)
    robustness.main([str(OUTPUT), str(CORPUS), "--clips", "16", "--system", "cnn"])
    _, tables, _ = robust(capsys.readouterr().out, robustness.CHANGES)
    assert list(tables) == ["AudioCNN"]
    for unchanged, uar, *_, refused in tables["AudioCNN"].values():
        assert (unchanged, uar, refused) == (100, 12.5, 0)


def test_robustness_hears_the_segments_of_a_table_and_knows_those_of_training(
        robustness, few_changes, copied):
    sounds = [next(CORPUS.glob(f"Actor_03/*-{code}-01-01-01-03.wav")) for code in ("05", "04")]
    lines = [f"{path.absolute()},{emotion},{start},1" for path, emotion in zip(sounds, ["angry", "sad"])
             for start in (0, 0.3)]
    Path("m.csv").write_text("\n".join(["path,emotion,start,end", *lines]))
    predictor = er.Predictor(OUTPUT, ask_systems="cnn,speech")
    clips = robustness.find_clips("m.csv", predictor, 9)
    assert "unknown" not in set(clips["split"])
    table = robustness.answers_to(clips, predictor, ["SpeechEncoder"]).query("change == 'none'")
    assert table["angry"].nunique() == len(clips) == 4


def test_robustness_reads_a_table_as_an_evaluation_does_whatever_the_training_had(robustness, copied):
    own_corpus(["anger", "happiness", "odd"], [7])
    predictor = er.Predictor(OUTPUT, ask_systems="speech")
    predictor.cfg = predictor.cfg._replace(split="statement_1", sentence_noise=0.5)
    assert set(robustness.find_clips("own/corpus.csv", predictor, 9)["emotion"]) == {"angry", "happy"}


def test_robustness_counts_no_speech_as_a_changed_and_wrong_answer(
        robustness, few_changes, copied, monkeypatch, capsys):
    answer_always(monkeypatch, 4)
    monkeypatch.setattr(er.Predictor, "gate", lambda self, clip, windows, heard: (
        er.spread_of(er.level_of(clip.mel)) > 20, ""))
    robustness.main([str(OUTPUT), str(CORPUS), "--clips", "16", "--system", "cnn"])
    _, tables, _ = robust(capsys.readouterr().out, robustness.CHANGES)
    rows = tables["AudioCNN"]
    unchanged, uar, *_, refused = rows["none"]
    assert (unchanged, uar, refused) == (100, 12.5, 0)
    unchanged, uar, *_, refused = rows["white noise, 0 dB"]
    assert (unchanged, uar, refused) == (0, 0, 16)


def test_robustness_says_when_clips_were_trained_on(
        robustness, copied, monkeypatch, capsys):
    answer_always(monkeypatch, 0)
    predictor = er.Predictor(OUTPUT)
    for checkpoint in predictor.checkpoints.values():
        checkpoint.windows["split"] = ["train"] * len(checkpoint.windows["split"])
    clips = robustness.find_clips(str(CORPUS), predictor, 12)
    assert set(clips["split"]) == {"train"}
    assert len(clips) == 12

    # Of eight emotions by each of six actors there is one before there are two.
    clips = robustness.find_clips(str(CORPUS), predictor, 48)
    assert len(clips.drop_duplicates(["emotion", "actor"])) == 48
    monkeypatch.setattr(er, "Predictor", lambda folder: predictor)
    robustness.main([str(OUTPUT), str(CORPUS), "--clips", "1", "--system", "cnn"])
    assert capsys.readouterr().out.startswith("1 clip; models trained on 1 of them; ")


@pytest.mark.parametrize(("argv", "problem"), [
    (["nowhere", "archive"], "nowhere holds no trained model"),
    ([str(OUTPUT), "nowhere"], "nowhere does not exist"),
    ([str(OUTPUT), "missing.csv"], "missing.csv is not readable as CSV"),
    ([str(OUTPUT), str(CORPUS), "--clips", "0"], "--clips 0 is less than 1"),
    ([str(OUTPUT), str(CORPUS), "--system", "rnn"], "--system rnn is none of cnn"),
])
def test_robustness_errors_are_one_sentence_with_exit_code_2(argv, problem, copied, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robustness.py", *argv])
    source = compile(ROBUSTNESS.read_text(encoding="utf-8"), str(ROBUSTNESS), "exec")
    with pytest.raises(SystemExit) as stop:
        exec(source, {"__name__": "__main__", "__file__": str(ROBUSTNESS)})
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {problem}")


# %% A page to speak to, archive/page.py
PAGE = SCRIPT.parent / "archive/page.py"
NOTHING = (None, None, None)  # no bars, no words, no plot


@pytest.fixture(scope="session")
def speaking():
    """The companion that serves the page."""
    return companion(PAGE)


@pytest.fixture
def sent(speaking, listener):
    """Answers samples as if they had been sent to the page, and sees that they are not kept."""
    def answer(samples, rate=RATE):
        path = written("upload.wav", samples, rate)
        shown = speaking.answer(str(path), listener)
        assert not path.exists()
        return shown
    return answer


def test_page_shows_what_the_predictor_answers(sent, listener):
    for emotion in ("angry", "calm"):
        samples = joined(emotion)
        verdict, bars, words, plot = sent(samples)
        assert verdict.startswith(f"## {emotion}\nAudioCNN. Speech: level, which moves by ")
        first = listener.predict(samples, RATE).iloc[0]
        assert bars == pytest.approx(first[["angry", "calm"]].to_dict(), abs=1e-3)  # 16 bits in the file
        assert (words, plot) == (None, None)


def test_page_says_unsure(sent, listener, monkeypatch):
    monkeypatch.setattr(listener, "thresholds", {"cnn": 1.1})
    verdict, bars, *_ = sent(joined("angry"))
    assert verdict.startswith("## unsure, perhaps angry\n")
    assert bars["angry"] > 0.5


def test_page_shows_no_bars_where_nobody_speaks(sent):
    assert sent(np.zeros(3 * RATE)) == ("## no speech\nsilent", *NOTHING)
    verdict, *others = sent(0.1 * np.random.default_rng(0).standard_normal(3 * RATE))
    assert verdict.startswith("## no speech\nMusic or noise? level")
    assert tuple(others) == NOTHING


@pytest.mark.parametrize(("heard", "words"), [("It is angry.", "It is angry."), ("", None)])
def test_page_shows_the_words_that_whisper_hears(heard, words, sent, listener, monkeypatch):
    monkeypatch.setattr(listener, "has_whisper", True)
    monkeypatch.setattr(er.Predictor, "gate", lambda *_: (True, "Whisper"))
    monkeypatch.setattr(er, "transcript_of", lambda *_: heard)
    verdict, _, shown, _ = sent(joined("angry"))
    assert verdict.startswith("## angry\nAudioCNN. Speech: Whisper")
    assert shown == words


def test_page_draws_emotion_over_time(sent, listener):
    *_, plot = sent(joined(*["angry"] * 4, *["calm"] * 4))
    (axis,), (legend,) = plot.axes, plot.legends
    assert [text.get_text() for text in legend.get_texts()] == ["calm", "angry"]
    calm, _ = axis.collections  # the lower of two stacked areas: its height is its probability
    seconds, height = calm.get_paths()[0].vertices.T
    middle = seconds.mean()
    assert height[seconds < middle - 3].max() < 0.5 < height[seconds > middle + 3].max()


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not readable: it is empty"),
    (b"no sound here", "not readable (Format not recognised)"),
    (b"RIFF\xff\xff\0\0WAVEfmt ", "cut off: less data than its header says"),
])
def test_page_says_why_an_upload_cannot_be_used_and_deletes_it(content, reason, speaking, listener):
    path = Path("upload.wav")
    path.write_bytes(content)
    assert speaking.answer(str(path), listener) == (
        f"## no answer\nThis recording cannot be used: {reason}.", *NOTHING)
    assert not path.exists()


def test_page_hears_five_minutes_and_no_more(sent, listener, monkeypatch):
    monkeypatch.setattr(listener, "hear", lambda *_, **__: 1 / 0)  # comes after the length
    verdict, *_ = sent(tone(301, 1000), 1000)
    assert verdict == "## no answer\nThis recording cannot be used: it is longer than 5 minutes."
    verdict, *_ = sent(tone(300, 1000), 1000)
    assert verdict == "## no answer\nThis recording cannot be used: division by zero."


def test_page_is_empty_once_a_recording_is_taken_away(speaking, listener):
    assert speaking.answer(None, listener) == (None, *NOTHING)


@pytest.fixture
def opened(speaking, learned, monkeypatch, tmp_path):
    """Opens the page, calls a function with it and its address while it is there, and closes it."""
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(speaking, "LARGEST", "200 KB")

    def visit(use):
        with socket.create_server(("127.0.0.1", 0)) as free:
            _, port = free.getsockname()
        monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: use(page, f"http://127.0.0.1:{port}"))
        speaking.main(["--output-dir", str(learned / "outputs"), "--port", str(port)])
    return visit


def stored():
    """The recordings that the page has stored."""
    return list(Path("uploads").rglob("*.wav"))


def test_page_is_for_this_machine_alone_and_keeps_no_recording(opened, capsys):
    client = pytest.importorskip("gradio_client")
    path = written("angry.wav", joined("angry"))

    def use(page, address):
        assert page.server.config.host == "127.0.0.1"
        assert (page.share, page.run_history, page.analytics_enabled) == (False, False, False)
        visitor = client.Client(address, verbose=False)
        verdict, bars, *others = visitor.predict(client.handle_file(path), api_name="/answer")
        assert verdict["value"].startswith("## angry\n")
        assert bars["value"]["label"] == "angry"
        assert [shown["visible"] for shown in (verdict, bars, *others)] == [True, True, False, False]
        assert not stored()

    opened(use)
    assert path.exists()  # the visitor's own
    assert re.fullmatch(r"http://127.0.0.1:\d+/ \(Ctrl-C ends it\)\n", capsys.readouterr().out)


def test_page_refuses_what_is_large_and_files_of_the_machine(opened):
    httpx = pytest.importorskip("httpx")
    own = written("own.wav", joined("angry"))

    def use(page, address):
        def send(content):
            return httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.wav", content)})
        assert send(bytes(300_000)).status_code == 413
        assert not stored()
        assert send(own.read_bytes()).status_code == 200
        assert stored()  # nobody asks for an answer: it goes when the page is closed

        file = {"path": str(own.absolute()), "meta": {"_type": "gradio.FileData"}}
        event = httpx.post(f"{address}/gradio_api/call/answer", json={"data": [file]}).json()["event_id"]
        assert httpx.get(f"{address}/gradio_api/call/answer/{event}").text.startswith("event: error")

    opened(use)
    assert own.exists()
    assert not stored()


def page_error(speaking, capsys, *argv):
    """The sentence with which the page ends, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        er.run_script(speaking.main, argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(("argv", "problem"), [
    (["--port", "0"], "--port 0 is not from 1 to 65535"),
    (["--port", "http"], "argument --port: invalid int value: 'http'"),
    (["--shar"], "unrecognized arguments: --shar"),
    (["--input", "a.wav", "--no-json"], "a page has no use for --input=a.wav --no-json: leave it out"),
    (["--epochs-cnn", "1"], "a page has no use for --epochs-cnn=1: leave it out"),
])
def test_page_flags_that_cannot_be_are_one_sentence(argv, problem, speaking, capsys):
    assert page_error(speaking, capsys, *argv).startswith(f"error: {problem}")


def test_page_without_models_is_one_sentence(speaking, capsys):
    pytest.importorskip("gradio")
    assert page_error(speaking, capsys, "--output-dir", "nowhere").startswith(
        "error: nowhere holds no trained model")


def test_page_names_the_port_that_is_in_use(speaking, learned, monkeypatch, capsys):
    monkeypatch.setattr(pytest.importorskip("gradio").Blocks, "block_thread", lambda page: None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        _, port = other.getsockname()
        line = page_error(speaking, capsys, "--output-dir", str(learned / "outputs"), "--port", str(port))
    assert line.startswith(f"error: --port {port} of --host 127.0.0.1 is in use or cannot be had")
    assert line.endswith(": name another")


@pytest.mark.parametrize(("gradio", "problem"), [
    (None, r"gradio does not load .*: pip install gradio"),
    (SimpleNamespace(Blocks=None, __version__="5.49.1"), r"gradio 5\.49\.1 .*: pip install -U gradio"),
])
def test_page_names_the_gradio_that_it_needs(gradio, problem, speaking, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    assert re.fullmatch(f"error: {problem}", page_error(speaking, capsys))


# %% AudioCNN as ONNX, archive/export.py
EXPORT = SCRIPT.parent / "archive/export.py"


@pytest.fixture(scope="session")
def exporter():
    return companion(EXPORT)


@pytest.fixture
def hearing(finished):
    """The Predictor of the finished demo, to which everything is speech."""
    predictor = er.Predictor(finished / OUTPUT)
    predictor.gate = lambda *heard: (True, "")
    return predictor


@pytest.fixture(scope="session")
def exported(exporter, finished, tmp_path_factory):
    """(onnxruntime's session of the AudioCNN of the finished demo, its folder, what was printed)."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    def fill(patch):
        Path("models").mkdir()
        shutil.copy(place_of("cnn", finished / OUTPUT), "models")
        with Path("printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
            exporter.main(["--output-dir", "models"])

    folder = filled(tmp_path_factory, "exported", fill) / "models"
    printed = folder.with_name("printed.txt").read_text()
    return runtime.InferenceSession(folder / "AudioCNN.onnx"), folder, printed


@pytest.fixture
def quick(exporter, copied, monkeypatch):
    """Nothing is exported, and no package for ONNX is needed: the file holds a word."""
    model = SimpleNamespace(metadata_props={}, doc_string="")
    program = SimpleNamespace(model=model, save=lambda path: Path(path).write_text("exported"))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: program)
    monkeypatch.setitem(sys.modules, "onnxscript", SimpleNamespace(__name__="onnxscript"))
    monkeypatch.setattr(exporter, "largest_difference", lambda path, predictor: 0.0)
    return model


VOICES = {  # samples at a rate
    "short": lambda rate: er.synthesize("fearful", 1, np.random.default_rng(1), rate),
    "long": lambda rate: np.tile(speech(rate), 4),
    "pause": lambda rate: np.concatenate([speech(rate), 1e-4 * tone(2, rate), speech(rate)]),
    "soft, then loud": lambda rate: np.concatenate([0.05 * np.tile(speech(rate), 2), speech(rate)]),
    "faint": lambda rate: 1e-3 * speech(rate)[rate // 7:],
    "noisy": lambda rate: speech(rate) + np.random.default_rng(2).normal(0, 0.02, len(speech(rate))),
}


def prepared(name, predictor):
    """(samples (n,) as the exported network takes them, the probabilities (C,) that Predictor gives them)."""
    rate = predictor.cfg.sampling_rate
    voice = VOICES[name](rate).astype(np.float32)
    samples, _ = er.load_samples(voice, predictor.cfg, rate)
    table = predictor.predict(voice, rate)
    return samples, table.loc["AudioCNN", predictor.classes].to_numpy(float)


@pytest.mark.parametrize("name", VOICES)
def test_the_exported_network_answers_as_predictor(name, exported, hearing):
    session, *_ = exported
    samples, answer = prepared(name, hearing)
    (probabilities,) = session.run(["probabilities"], {"samples": samples[None]})
    assert abs(probabilities - answer).max() < 1e-4


@pytest.mark.parametrize("size", [1, 3])
def test_recordings_of_a_batch_do_not_change_each_others_answer(size, exported, hearing):
    session, *_ = exported
    samples, answer = prepared("noisy", hearing)
    others = np.random.default_rng(0).normal(size=(size, len(samples)))
    batch = np.concatenate([others, samples[None]]).astype(np.float32)
    (probabilities,) = session.run(None, {"samples": batch})
    assert probabilities.shape == (size + 1, 8)
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert abs(probabilities[-1] - answer).max() < 1e-4
    assert abs(probabilities[0] - answer).max() > 1e-4


@pytest.mark.parametrize("samples", [np.zeros(4096), tone(0.3, RATE), 1e4 * speech()])
def test_the_exported_network_has_an_answer_to_whatever_it_hears(samples, exported):
    session, *_ = exported
    (probabilities,) = session.run(None, {"samples": np.float32([samples])})
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_the_exported_file_says_what_a_program_must_know(exported, hearing):
    session, folder, printed = exported
    assert sorted(path.name for path in folder.iterdir()) == ["AudioCNN.onnx", "AudioCNN_best.pth"]
    meta = session.get_modelmeta()
    assert printed.startswith("models/AudioCNN.onnx: largest difference to Predictor ")
    assert meta.description in printed
    assert "mono at 16000 Hz, 4096 and more" in meta.description

    facts = meta.custom_metadata_map
    assert json.loads(facts["classes"]) == er.EMOTIONS
    assert float(facts["temperature"]) == hearing.calibration["cnn"]
    assert facts["sampling_rate"] == "16000"
    assert facts["caveats"] == "; ".join(hearing.checkpoints["cnn"].caveats)
    assert facts["version"].startswith(f"{er.__version__}, training ")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("samples", "tensor(float)", ["recordings", "length"])
    assert (returned.name, returned.shape) == ("probabilities", ["recordings", 8])


def test_the_lines_that_the_exported_file_holds_ask_it(exported, hearing, monkeypatch):
    import onnxruntime
    import scipy
    session, folder, _ = exported
    monkeypatch.chdir(folder)
    *_, lines = session.get_modelmeta().description.split("\n\n")
    known = {"onnxruntime": onnxruntime, "json": json, "scipy": scipy, "np": np, "samples": speech()}
    exec(lines, known)
    table = hearing.predict(speech(), RATE)
    assert abs(known["answer"] - table.loc["AudioCNN", er.EMOTIONS].to_numpy(float)).max() < 1e-4


@pytest.mark.parametrize("changes", [
    {},
    {"sampling_rate": 8000, "n_mels": 40, "hop_length": 100, "n_fft": 512},
    {"sampling_rate": 22050, "hop_length": 300, "n_fft": 1000, "trim_db": 20.0, "clip_seconds": 1.5},
    {"test_views": 1},
])
def test_the_network_from_samples_hears_as_predictor_under_any_settings(changes, exporter, hearing):
    hearing.cfg = hearing.cfg._replace(**changes)
    network = exporter.FromSamples(hearing).eval()
    for name in VOICES:
        samples, answer = prepared(name, hearing)
        with torch.inference_mode():
            probabilities = network(torch.from_numpy(samples)[None])
        assert abs(probabilities.numpy() - answer).max() < 1e-4, name


@pytest.mark.parametrize(("settings", "licence"), [
    ({"demo": True}, "that of its corpus"),
    ({"demo": False, "manifest": "m.csv"}, "that of its corpus"),
    ({"demo": False}, "CC BY-NC-SA 4.0, as RAVDESS"),
])
def test_the_exported_file_names_the_licence_of_ravdess_where_it_was_trained_on_it(
        settings, licence, exporter, quick, hearing):
    hearing.cfg = hearing.cfg._replace(**settings)
    exporter.export(hearing)
    assert quick.metadata_props["licence"] == licence


OLD_RUNTIME = SimpleNamespace(__name__="onnxruntime", __version__="1.2", InferenceSession=Path)  # cannot run


@pytest.mark.parametrize(("runtime", "problem"), [
    (None, "onnxruntime does not load beside torch"),
    (OLD_RUNTIME, "onnxruntime 1.2 cannot read the file"),
])
def test_with_no_or_an_old_onnxruntime_the_file_is_written_and_not_compared(
        runtime, problem, quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    companion(EXPORT).main(["--demo"])
    assert Path(OUTPUT, "AudioCNN.onnx").read_text() == "exported"
    (warning,) = capsys.readouterr().err.strip().splitlines()
    assert warning.startswith(f"warning: {problem}")
    assert "pip install --upgrade onnxscript onnxruntime" in warning


def test_a_file_that_would_answer_otherwise_is_not_left_behind(exporter, quick, monkeypatch):
    before = contents(OUTPUT)
    monkeypatch.setattr(exporter, "largest_difference", lambda path, predictor: 0.3)
    with pytest.raises(er.UserError, match=r"AudioCNN\.onnx would answer otherwise, by up to 0\.3: pip"):
        exporter.main(["--demo"])
    assert contents(OUTPUT) == before


def without_onnxscript(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)


def without_audio_cnn(monkeypatch):
    place_of("cnn").unlink()


def with_a_broken_audio_cnn(monkeypatch):
    cut(place_of("cnn"), 1000)


def with_a_folder_in_the_way(monkeypatch):
    Path(OUTPUT, "AudioCNN.onnx").mkdir()
    monkeypatch.setattr(er, "only_warning", lambda *_, **__: contextlib.suppress(er.UserError))


def with_another_exporter(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *args: None)  # which knows no options


@pytest.mark.parametrize(("argv", "case", "problem"), [
    (["--output-dir", "nowhere"], None, "nowhere holds no trained model: train with --phase all"),
    ([], None, "outputs holds no trained model"),
    (["--demo"], without_audio_cnn, "outputs/demo holds no AudioCNN, .*: train it with --run-models cnn"),
    (["--demo"], with_a_broken_audio_cnn, "outputs/demo/AudioCNN_best.pth is not a usable checkpoint"),
    (["--demo"], with_a_folder_in_the_way, "outputs/demo/AudioCNN.onnx cannot be written"),
    (["--demo"], without_onnxscript, "onnxscript does not load .*: pip install --upgrade onnxscript"),
    (["--demo"], with_another_exporter, "torch .* and onnxscript do not fit: pip install"),
    (["--output-dri", "x"], None, "unrecognized arguments: --output-dri x .*--output-dir"),
    (["--epochs-cnn", "3"], None, "--phase predict has no use for --epochs-cnn=3: leave it out"),
    (["--channel", "1"], None, "an ONNX file has no use for --channel=1: leave it out"),
])
def test_export_errors_are_one_sentence_with_exit_code_2(argv, case, problem, quick, monkeypatch, capsys):
    if case:
        case(monkeypatch)
    before = contents(OUTPUT)
    monkeypatch.setattr(sys, "argv", ["export.py", *argv])
    source = compile(EXPORT.read_text(encoding="utf-8"), str(EXPORT), "exec")
    with pytest.raises(SystemExit) as stop:
        exec(source, {"__name__": "__main__", "__file__": str(EXPORT)})
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"error: {problem}", line)
    assert contents(OUTPUT) == before


def test_a_split_by_text_has_results_of_both_ways_round_together(heard, unpublished):
    er.main([*heard, *TINY, "--run-models", "rnn", "--phase", "unimodal", "--split", "text"])
    table, config = predictions("outputs"), read_json("outputs/config.json")
    assert not table["clip"].duplicated().any()
    assert set(config["calibration"]) == {"fold_0_seed_42_statement_1", "fold_0_seed_42_statement_2"}
    assert "tested on sentences that are not in training" in config["caveats"]
    assert set(pd.read_csv("outputs/histories.csv")["run"]) == set(config["calibration"])
    lines = pd.DataFrame(read_json("outputs/metrics.json")).query("by == 'statement' and split == 'test'")
    assert lines["clips"].to_list() == [sum(table["split"] == "test") / 2] * 2


# %% Many runs at once, archive/jobs.py
JOBS = SCRIPT.parent / "archive/jobs.py"
TWO_FOLDS = [*TINY, "--run-models", "rnn", "--phase", "unimodal", "--folds", "0,1"]


@pytest.fixture(scope="session")
def jobs():
    return companion(JOBS)


def test_a_single_one_of_several_runs_is_trained_without_results(heard, unpublished, capsys):
    er.main([*heard, *TWO_FOLDS, "--only-run", "2"])
    assert [path.name for path in Path("outputs").iterdir()] == ["fold_1_seed_42"]
    assert place_of("rnn", "outputs/fold_1_seed_42").exists()
    assert "TextRNN" in Path("outputs/fold_1_seed_42/log.txt").read_text()
    assert "TextRNN" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    "--only-run 3 --folds 0,1",
    "--only-run 2",
    "--only-run 5 --split text --runs 2"])
def test_a_run_that_is_none_of_several_is_refused(flags):
    assert "--only-run" in outcome(*flags.split())


def test_runs_at_once_are_those_that_come_one_after_the_other(heard, unpublished, jobs):
    er.main([*heard, *TWO_FOLDS, "--output-dir", "one_by_one"])
    jobs.main(["--jobs", "2", "--", *heard, *TWO_FOLDS])
    for fold in ("fold_0_seed_42", "fold_1_seed_42"):
        one, other = (checkpoint_of("rnn", Path(folder, fold)) for folder in ("one_by_one", "outputs"))
        assert all(map(torch.equal, one["weights"].values(), other["weights"].values()))
        assert torch.equal(one["log_probs"], other["log_probs"])
        assert "epoch" in Path("outputs", fold, "log.txt").read_text()  # it was trained there
    assert predictions("outputs").equals(predictions("one_by_one"))
    assert not list(Path("outputs").glob(".jobs*"))


def commands(*texts):
    """Stands for the command lines of runs: short programs in their place."""
    return lambda flags, place, *more: [sys.executable, "-c", texts[place]]


def asked_for(**changes):
    return SimpleNamespace(**{"jobs": 2, "scheduler": ""} | changes)


def runs_named(*names):
    return [config(output_dir=name) for name in names]


def test_a_run_that_fails_is_named_and_the_others_end(jobs, monkeypatch):
    texts = ["open('a', 'w')", "import sys; print('much'); sys.exit('error: no disk')", "open('c', 'w')"]
    monkeypatch.setattr(jobs, "command_of", commands(*texts))
    failed = jobs.train_all(runs_named("a", "b", "c"), [], SCRIPT, asked_for())
    assert failed == {"b": "error: no disk"}
    assert Path("a").exists() and Path("c").exists()


def test_what_failed_is_said_before_there_are_results(heard, unpublished, jobs, monkeypatch):
    monkeypatch.setattr(jobs, "train_all", lambda *_: {"outputs/fold_1_seed_42": "error: no disk"})
    with pytest.raises(er.UserError, match=r"1 of 2 runs failed, the others are kept: .*: error: no disk"):
        jobs.main(["--jobs", "2", "--", *heard, *TWO_FOLDS])
    assert not Path("outputs/predictions.csv").exists()


def test_runs_end_when_the_command_that_wants_them_does(jobs):
    beacon = Path("beacon")
    beacon.touch()
    threading.Timer(1.0, beacon.unlink).start()
    start = time.perf_counter()
    code, _ = jobs.run_apart([sys.executable, "-c", "import time; time.sleep(60)"], ".", "beacon", {})
    assert code != 0
    assert time.perf_counter() - start < 20
    assert jobs.run_apart(["never", "started"], ".", "beacon", {}) == (2, "beacon is not there, or no longer")


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, [("4", "0"), ("4", "1"), ("4", "0")]),
    ({"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1"}, [("1", "3")] * 3),
])
def test_threads_and_gpus_are_divided_and_those_of_the_user_stay(environment, expected, jobs, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    shares = [jobs.share_of(place, 2) for place in range(3)]
    assert [(share["OMP_NUM_THREADS"], share["CUDA_VISIBLE_DEVICES"]) for share in shares] == expected


@pytest.mark.parametrize(("argv", "problem"), [
    (["--jobs", "0"], "--jobs 0 is none of 1 to 2"),
    (["--jobs", "3"], "--jobs 3 is none of 1 to 2"),
    (["--", "--only-run", "1"], "--only-run is what this script decides"),
    (["--", "--phase", "report"], "--phase report trains nothing"),
])
def test_jobs_refuse_what_makes_no_sense(argv, problem, jobs):
    given, _, flags = " ".join(argv).partition("-- ")
    with pytest.raises(er.UserError, match=problem):
        jobs.main([*given.split(), "--", "--folds", "0,1", *flags.split()])


@pytest.fixture(scope="session")
def cluster():
    """A Dask cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def test_a_run_whose_worker_dies_is_done_by_another(cluster, jobs, monkeypatch):
    # The first to come ends the worker that started it.
    deadly = ("import os, pathlib, time; mark = pathlib.Path('mark'); new = not mark.exists(); mark.touch(); "
              "new and os.kill(os.getppid(), 9); pathlib.Path('done').touch()")
    texts = ["pass", deadly, "open('c', 'w')"]
    monkeypatch.setattr(jobs, "command_of", commands(*texts))
    runs = runs_named("a", "b", "c")
    failed = jobs.train_all(runs, [], SCRIPT, asked_for(scheduler=cluster.scheduler_address))
    assert failed == {}
    assert Path("mark").exists() and Path("done").exists() and Path("c").exists()


def test_a_worker_that_cannot_do_it_is_named_before_anything_starts(cluster, jobs, monkeypatch):
    monkeypatch.setattr(jobs, "command_of", commands("import sys; sys.exit('error: no corpus')"))
    with pytest.raises(er.UserError, match=r"the worker tcp://.* cannot do a run: error: no corpus"):
        jobs.train_all(runs_named("a"), [], SCRIPT, asked_for(scheduler=cluster.scheduler_address))


def test_a_cluster_that_is_lost_is_one_sentence(jobs, monkeypatch):
    def lost(**_):
        raise RuntimeError("no workers left")
    monkeypatch.setattr(jobs.joblib, "Parallel", lost)
    with pytest.raises(er.UserError, match=r"runs were lost \(no workers left\): what is finished is kept"):
        jobs.train_all(runs_named("a"), [], SCRIPT, asked_for())


def test_a_scheduler_that_is_not_there_is_one_sentence(jobs):
    pytest.importorskip("distributed")
    with pytest.raises(er.UserError, match=r"--scheduler tcp://127\.0\.0\.1:9 cannot be used"):
        jobs.cluster_of("tcp://127.0.0.1:9", print)


def test_without_dask_the_line_that_installs_it_is_said(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(er.UserError, match=r"dask.distributed does not load .*: pip install .dask\["):
        jobs.cluster_of("tcp://127.0.0.1:9", print)


# %% The search, archive/tune.py
TUNE = SCRIPT.parent / "archive/tune.py"
TUNED = OUTPUT.parent / "tune_rnn"


@pytest.fixture(scope="session")
def tune():
    pytest.importorskip("optuna")
    return companion(TUNE)


@pytest.fixture
def search(tune, heard, undrawn):
    """A search for TextRNN's settings by flags, over two folds of the demo's corpus in one epoch."""
    return lambda trials, *flags: tune.main(
        ["--models", "rnn", "--trials", str(trials), "--", *TINY, "--folds", "0,1", *heard, *flags])


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained: NLL is least near a dropout of 0.25, and fold 1 is harder. The runs asked for."""
    runs, classes = [], len(er.EMOTIONS)

    def logits_of(run, labels):
        sharpness = 3 - 4 * abs(run.dropout - 0.25) - run.fold
        noise = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(run.fold))
        return noise + sharpness * F.one_hot(labels, classes)

    def train(kind, parts, clips, run, device, state, fingerprint):
        runs.append(run)
        validation = SimpleNamespace(labels=torch.arange(64) % classes)
        for _ in range(run.epochs_rnn):
            er.logits_of(run, validation)
        return run, []

    def infer(run, windows, *_):
        return logits_of(run, torch.tensor(windows["emotion"].cat.codes.tolist()))[None]

    monkeypatch.setattr(er, "train", train)
    monkeypatch.setattr(er, "infer", infer)
    monkeypatch.setattr(er, "logits_of", lambda run, validation: logits_of(run, validation.labels))
    return runs


def trials_of(folder=TUNED):
    return pd.read_csv(folder / "trials.csv")


@pytest.mark.parametrize("name", ["cnn", "rnn", "speech"])
def test_a_search_begins_with_the_validation_figures_of_a_run_and_hears_no_test_clip(
        name, tune, finished, demo, heard, undrawn, monkeypatch):
    seen, start = set(), er.ClipDataset.__init__

    def watched(self, clips, *rest, **options):
        seen.update(clips["clip"])
        start(self, clips, *rest, **options)

    def train(kind, parts, clips, *rest):
        assert set(clips["split"]) == {"train", "validation"}
        return TRAIN(kind, parts, clips, *rest)

    TRAIN = er.train
    monkeypatch.setattr(er, "train", train)
    monkeypatch.setattr(er.ClipDataset, "__init__", watched)
    whisper = f"--whisper-model={finished / DEMO_WHISPER}"
    tune.main(["--models", name, "--trials", "1", "--", *TINY, *heard, whisper])
    folder = OUTPUT.parent / f"tune_{name}"
    (trial,) = trials_of(folder).to_dict("records")
    expected = figures(finished / OUTPUT, split="validation")[name]
    assert trial["state"] == "COMPLETE"
    assert trial["uar"] == trial["uar_fold_0"] == pytest.approx(expected["uar"], abs=1e-6)
    assert trial["nll"] == trial["nll_fold_0"] == pytest.approx(expected["nll"], abs=1e-4)
    _, clips = demo
    assert seen == set(clips.query("split != 'test'")["clip"])


def test_a_search_finds_better_settings_and_the_command_that_has_them(search, untrained, capsys):
    search(15)
    table, best = trials_of(), read_json(TUNED / "best.json")
    assert best["number"] > 0
    assert list(table["number"]) == list(range(15))
    assert list(table["present"].dropna().items()) == [(0, True)]
    present = er.parse_settings(TINY)
    assert f"--dropout={present.dropout} " in table["flags"][0]
    done = table[table["state"] == "COMPLETE"]
    assert np.allclose(done["nll"], done[["nll_fold_0", "nll_fold_1"]].mean(axis=1), atol=1e-6)
    assert np.allclose(done["uar"], done[["uar_fold_0", "uar_fold_1"]].mean(axis=1), atol=1e-6)
    winner = done.loc[done["nll"].idxmin()]
    assert (best["number"], best["flags"]) == (winner["number"], winner["flags"])

    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == best["command"]
    program, script, *flags = shlex.split(best["command"])
    assert (program, script) == ("python", "emotion_recognition.py")
    again = er.parse_settings(flags)
    assert again.run_models == "rnn"
    run = next(run for run in untrained if f"--dropout={run.dropout} " in winner["flags"])
    for key in ("dropout", "learning_rate_rnn", "ema_decay", "batch_size", "word_dropout", "folds"):
        expected = "0,1" if key == "folds" else getattr(run, key)
        assert getattr(again, key) == expected


def test_what_half_of_the_folds_cannot_tell_is_measured_on_the_others(tune, undrawn, monkeypatch, tmp_path):
    columns = {"number": [0, 1, 2], "state": ["COMPLETE"] * 3, "value": [2.0, 1.5, 1.75],
               "user_attrs_flags": list("abc"), "user_attrs_present": [True, None, None],
               "user_attrs_nll_fold_0": [2.0, 1.0, 1.5], "user_attrs_nll_fold_1": [2.0, 2.0, 2.0],
               "user_attrs_nll_fold_2": [2.0, 1.5, 1.0], "user_attrs_uar_fold_0": [0.5] * 3}
    study = SimpleNamespace(trials_dataframe=lambda attributes: pd.DataFrame(columns))
    monkeypatch.setattr("optuna.visualization.matplotlib.plot_optimization_history", lambda *_, **__: None)
    monkeypatch.setattr("optuna.visualization.matplotlib.plot_param_importances", lambda *_, **__: None)
    tune.conclude(study, tmp_path, config(run_models="rnn"), ())
    # Folds 0 and 1 choose b, 0.5 above c on fold 2; 1 and 2 choose c, 0.5 above b on 0; on 1 all are alike.
    found = read_json(tmp_path / "best.json")
    assert found["command"] == "python emotion_recognition.py b"
    assert found["gap"].endswith("NLL on the others +0.333 over the best, -0.333 over the present.")


def test_the_same_search_has_the_same_trials_and_goes_on_where_it_was(search, untrained, monkeypatch):
    search(6)
    whole = trials_of()
    assert len(untrained) >= 7
    search(6)
    pd.testing.assert_frame_equal(trials_of(), whole)
    search(6, "--output-dir=again")
    pd.testing.assert_frame_equal(trials_of(Path("again/tune_rnn")), whole)

    asked = len(untrained)
    search(7)
    assert asked < len(untrained) <= asked + 2
    pd.testing.assert_frame_equal(trials_of()[:6], whole)
    assert trials_of()["flags"].nunique() == 7


def test_a_search_that_is_stopped_keeps_what_is_finished(search, untrained, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, er, "train", 4)
        with pytest.raises(KeyboardInterrupt):
            search(3)
    assert list(trials_of()["state"]) == ["COMPLETE", "FAIL"]
    assert trials_of()["nll"].notna().tolist() == [True, False]
    search(3)
    assert list(trials_of()["state"]) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_present_settings_that_were_stopped_are_tried_again(search, untrained, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, er, "train", 1)
        with pytest.raises(er.UserError, match="no trial was completed"):
            search(2)
    search(2)
    table = trials_of()
    assert list(table["state"]) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert table["flags"][0] == table["flags"][1]
    assert table["present"][1]


def test_trials_whose_epochs_are_worse_than_the_median_end_early(search, untrained, monkeypatch):
    reported, logits_of = [], er.logits_of

    def counted(run, validation):
        reported.append(run)
        return logits_of(run, validation)

    monkeypatch.setattr(er, "logits_of", counted)
    search(12, "--epochs-rnn=6")
    table = trials_of()
    assert set(table["state"][:5]) == {"COMPLETE"}
    assert set(table["state"]) == {"COMPLETE", "PRUNED"}
    pruned = table[table["state"] == "PRUNED"]
    assert list(pruned["pruned"]) == [f"NLL {nll:.3f}, worse than the median" for nll in pruned["nll"]]
    assert pruned["uar"].isna().all()
    assert len(reported) < 12 * 2 * 6
    # The first third of the epochs decides nothing.
    for flags in pruned["flags"]:
        assert sum(f"--dropout={run.dropout} " in flags for run in reported) >= 3


def test_a_trial_that_diverges_is_pruned_with_its_reason_and_the_search_goes_on(tune, search, monkeypatch):
    monkeypatch.setattr(tune, "RANGES", {"learning_rate_rnn": dict(low=1e32, high=1e33, log=True)})
    search(3, "--batch-size=4")
    table = trials_of()
    assert list(table["state"]) == ["COMPLETE", "PRUNED", "PRUNED"]
    assert set(table["pruned"][1:]) == {"the training loss is nan in epoch 1: lower --learning-rate-rnn"}


def test_a_search_without_any_complete_trial_says_where_the_reasons_are(search, untrained, monkeypatch):
    def train(*_):
        raise er.UserError("the training loss is nan")

    monkeypatch.setattr(er, "train", train)
    with pytest.raises(er.UserError, match=rf"no trial was completed, {TUNED}/trials\.csv has the reasons"):
        search(2)
    assert list(trials_of()["pruned"]) == ["the training loss is nan"] * 2


def test_a_setting_among_the_flags_is_not_searched(search, untrained):
    search(3, "--dropout=0.25")
    assert {run.dropout for run in untrained} == {0.25}
    assert not trials_of()["flags"].str.contains("--dropout=").any()


OTHER_SEARCHES = {  # flags: what has changed
    "--folds=0,2": "folds 0,1 -> 0,2",
    "--dropout=0.25": "dropout 0.4 -> 0.25, ranges changed",
    "--seed=7": "seed 42 -> 7",
    "--epochs-rnn=2": "epochs_rnn 1 -> 2",
}


@pytest.mark.parametrize("flag", OTHER_SEARCHES)
def test_a_search_does_not_go_on_with_the_trials_of_another(flag, search, untrained):
    search(1)
    before = trials_of()
    with pytest.raises(er.UserError, match=r"trials.journal is of another search \(.*"
                       + re.escape(OTHER_SEARCHES[flag]) + r".*\): move it or name another --output-dir"):
        search(2, flag)
    pd.testing.assert_frame_equal(trials_of(), before)
    search(2)
    assert len(trials_of()) == 2


def test_a_journal_of_something_else_is_named(search, untrained):
    er.save(TUNED / "trials.journal", b"clip,emotion\na.wav,sad\n")
    with pytest.raises(er.UserError, match=r"trials.journal .*not readable.* move it or name another"):
        search(1)
    assert untrained == []


@pytest.mark.parametrize("name", ["cnn", "rnn"])
def test_a_search_is_drawn_with_the_caveats_of_what_was_read(name, tune, heard, untrained, monkeypatch):
    titles = []

    def save_figure(figure, *rest, **options):
        SAVE_FIGURE(figure, *rest, **options)
        titles.append(figure.get_suptitle())

    monkeypatch.setattr(er, "save_figure", save_figure)
    tune.main(["--models", name, "--trials", "3", "--", *TINY, *heard])
    folder = OUTPUT.parent / f"tune_{name}"
    for plot in ("plot_optimization_history.png", "plot_param_importances.png"):
        assert (folder / plot).stat().st_size > 5000
    assert ["oracle" in title for title in titles] == [name == "rnn"] * 2
    assert read_json(folder / "best.json")["gap"] == ""  # a single fold


def test_a_search_without_optuna_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.storages.journal", None)
    with pytest.raises(er.UserError, match=r'optuna.*pip install "optuna>=4"'):
        companion(TUNE).main(["--models", "rnn"])


@pytest.mark.parametrize(("argv", "problem"), [
    (["--trials", "0"], "error: --trials 0 is less than 1"),
    (["--trials", "many"], "error: argument --trials: invalid int value: 'many'"),
    (["--models", "fusion_rnn"], "error: argument --models: invalid choice: 'fusion_rnn'"),
    (["--", "--runs=2"], "error: a search has no use for --phase, --input, --runs"),
    (["--", "--no-use-simulated-sentences"], "error: a search reads no transcripts of Whisper's"),
    (["--", "--epoch-rnn=3"], "error: unrecognized arguments: --epoch-rnn=3"),
    (["--", "--ravdess-path=nowhere"], "error: .*nowhere"),
    (["--", *(f"--{key}=0.1" for key in ("learning-rate-rnn", "weight-decay", "dropout", "word-dropout",
                                         "label-smoothing", "ema-decay")), "--batch-size=8"],
     "error: every setting of the search stands among the flags"),
])
def test_errors_of_a_search_are_one_sentence_with_exit_code_2(argv, problem, tune, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--models", "rnn", *argv])
    source = compile(TUNE.read_text(encoding="utf-8"), str(TUNE), "exec")
    with pytest.raises(SystemExit) as stop:
        exec(source, {"__name__": "__main__", "__file__": str(TUNE)})
    assert stop.value.code == 2
    assert re.search(problem, capsys.readouterr().err.strip().splitlines()[-1])
    assert contents(".") == {}


# %% Prediction on one's own recordings
ANSWER = ["recording", "error", "model", "predicted", "unsure", *er.EMOTIONS]
COLUMNS = [*ANSWER, "gate", "note", "text", "text_source", "over_time", "caveats", "key"]
TITLES = {name: er.SYSTEMS[name].title for name in SHOWN}
PREDICTING = ["--demo", "--phase", "predict", "--input"]
RECORDINGS = OUTPUT / "recordings"
ORACLE = "trained on simulated sentences"


def joined(*parts):
    """Voices one after the other, (n,) float32; a part is an emotion, or samples."""
    rng, waves = np.random.default_rng(7), []
    for part in parts:
        if isinstance(part, str):
            part = er.synthesize(part, 9, rng, RATE)
        waves.append(part)
    return np.concatenate(waves).astype(np.float32)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A folder with models that tell angry from calm; speaker 2 validates them.

    Every fourth clip of that speaker is long, and one part of four is spoken in the other way.
    """
    def fill(patch):
        patch.setattr(er, "save_figure", lambda figure, *_, **__: er.plt.close(figure))
        patch.setattr(er, "write_report", lambda results: None)
        command = own_corpus(
            ["angry", "calm"],
            speakers=range(1, 7),
            takes=6,
            transcript=lambda emotion, *_: f"It is {emotion}.")
        clips = pd.read_csv("own/corpus.csv").query("speaker == 2")
        for clip in clips[::4].itertuples():
            path = f"own/{clip.path}"
            own, _ = soundfile.read(path)
            other = {"angry": "calm", "calm": "angry"}[clip.emotion]
            written(path, joined(own, own, own, other))
        command += ["--epochs-cnn", "8", "--batch-size", "8", "--mixup", "0", "--run-models", "cnn,rnn"]
        er.main(command)

    return filled(tmp_path_factory, "learned", fill)


@pytest.fixture(scope="session")
def listener(learned):
    """The Predictor of models that tell angry from calm."""
    return er.Predictor(learned / "outputs")


def distance(listener, first, second):
    """How far the probabilities of two answers of a Predictor lie apart at most."""
    gaps = first[listener.classes] - second[listener.classes]
    return gaps.abs().max(axis=None)


def answering(names):
    """The titles of some systems."""
    return {TITLES[name] for name in names}


def in_order(predictor):
    """The systems of the demo in the order of an answer: who was best on validation stands first."""
    return sorted(SHOWN, key=lambda name: name != predictor.first)


def said_by(name, table):
    """The rows of a table of predictions that are those of a system."""
    return table[table["system"] == name]


def test_an_answer_is_that_of_the_predictions_table(demo, finished):
    cfg, clips = demo
    first = clips.query("split == 'test'").iloc[0]
    path = finished / first["path"]
    predictor = er.Predictor(cfg.output_dir, whisper_model=cfg.whisper_model)
    answer = predictor.predict(path, text=first["transcript"])
    names = in_order(predictor)
    assert list(answer.index) == [TITLES[name] for name in names]

    table = predictions(cfg.output_dir)
    saved = table[table["clip"] == path.stem].set_index("system")
    assert list(saved.index) == SHOWN
    saved = saved.loc[names]
    assert list(saved["predicted"]) == list(answer["predicted"])
    assert np.allclose(answer[er.EMOTIONS], saved[er.EMOTIONS], atol=1e-5)
    assert list(answer["note"]) == [ORACLE * (name not in WORDLESS) for name in names]


@pytest.mark.parametrize(("suffix", "rate", "channels", "loudness"), [
    ("wav", 44100, 2, 1),
    ("flac", 48000, 1, 0.02),
    ("ogg", 22050, 1, 1),
    ("mp3", 44100, 2, 0.5),
    ("wav", 8000, 1, 1),
    ("aiff", 16000, 6, 1),
])
def test_any_format_rate_loudness_and_number_of_channels_is_heard(suffix, rate, channels, loudness, listener):
    for emotion in listener.classes:
        spoken = joined(emotion)
        mono = er.soxr.resample(spoken, RATE, rate) * loudness
        samples = np.stack([mono] * channels, axis=1)
        soundfile.write(f"a.{suffix}", samples, rate)
        of_file = listener.predict(f"a.{suffix}")
        assert list(of_file.index) == ["AudioCNN"]
        if rate == 8000:  # half of the bands are empty
            spoken = er.soxr.resample(mono, rate, RATE)
        else:
            assert list(of_file["predicted"]) == [emotion]

        reference = listener.predict(spoken, RATE)
        of_array = listener.predict(samples.T, rate)
        of_numbers = listener.predict((mono * 32767).astype(np.int16), rate)
        assert distance(listener, of_file, reference) < 0.25
        assert distance(listener, of_array, reference) < 0.25
        assert distance(listener, of_numbers, of_file) < 0.25


@pytest.mark.parametrize(("dtype", "middle", "scale"), [
    ("uint8", 128, 127),
    ("int16", 0, 32767),
    ("int32", 0, 2**31 - 256),
    ("float64", 0, 1),
])
def test_arrays_of_any_type_are_the_same_recording(dtype, middle, scale, listener):
    for emotion in listener.classes:
        spoken = joined(emotion)
        numbers = spoken.astype(float) * scale + middle
        answer = listener.predict(numbers.astype(dtype), RATE)
        assert list(answer["predicted"]) == [emotion]
        assert distance(listener, answer, listener.predict(spoken, RATE)) < 0.25


@pytest.mark.parametrize("rate", [None, 0, -1, 0.5, math.inf, math.nan])
def test_an_array_needs_a_sampling_rate(rate, listener):
    samples = speech()
    with pytest.raises(er.UserError, match="sampling_rate in Hz"):
        listener.predict(samples, rate)


@pytest.mark.parametrize("kind", ["cube", "text", "complex", "number"])
def test_what_is_neither_path_nor_samples_is_said_to_be_so(kind, listener):
    recordings = {
        "cube": np.zeros((2, 2, 2)),
        "text": np.array(["a"]),
        "complex": np.ones(9, complex),
        "number": 7.0,
    }
    with pytest.raises(er.UserError, match=r"a recording is a path, or an array of numbers of shape \(n,\)"):
        listener.predict(recordings[kind], RATE)


@pytest.mark.parametrize(("path", "reason"), [
    ("take_12.wav", "does not exist"), (".", "is a folder"), ("https://example.org/a.wav", "download it")])
def test_an_error_of_a_predictor_names_the_recording_and_the_reason(path, reason, listener):
    for ask in (listener.predict, listener.predict_over_time):
        with pytest.raises(er.AudioError, match=f"^{path}: it .*{reason}"):
            ask(path)


def test_librosa_is_asked_for_what_soundfile_cannot_read(listener, monkeypatch):
    import librosa
    spoken = joined("calm")
    decoded = er.soxr.resample(spoken, RATE, 44100), 44100
    monkeypatch.setattr(librosa, "load", lambda path, sr, mono: decoded)
    touch(".", "a.m4a")
    answer = listener.predict("a.m4a")
    assert list(answer["predicted"]) == ["calm"]
    assert distance(listener, answer, listener.predict(spoken, RATE)) < 0.05


@pytest.mark.parametrize("kind", ["silence", "hiss", "hum", "click"])
def test_silence_and_steady_noise_are_no_speech(kind, listener):
    recordings = {
        "silence": np.zeros(32000),
        "hiss": np.random.default_rng(0).normal(size=48000) * 0.05,
        "hum": tone(3, RATE, pitch=50),
        "click": np.pad(np.ones(400) * 0.5, 8000),
    }
    answer = listener.predict(recordings[kind], RATE, text="What a day.")
    assert list(answer["predicted"]) == ["no speech"]
    assert answer[listener.classes].isna().all(axis=None)
    assert re.match("silent|level, which moves by [0-6] dB", answer["gate"].iloc[0])
    course = listener.predict_over_time(recordings[kind], RATE)
    assert set(course["predicted"]) == {"no speech"}
    assert set(course["voiced"]) == {0}
    assert course[listener.classes].isna().all(axis=None)


def test_a_long_recording_is_cut_into_windows_that_count_by_their_voice(listener):
    pause = np.zeros(10 * RATE)
    beginning = pause[:RATE]
    angry, calm = ["angry"] * 4, ["calm"] * 4
    samples = joined(beginning, *angry, pause, *calm)
    seconds = len(samples) / RATE
    course = listener.predict_over_time(samples, RATE)
    starts = course["start"].to_numpy()
    ends = course["end"].to_numpy()
    assert starts[0] == pytest.approx(1.15, abs=0.1)
    assert ends[-1] == pytest.approx(seconds, abs=0.2)
    # A quarter second is left of the pause, in the times of the recording.
    steps = np.diff(starts)
    long = steps > 5
    assert sum(long) == 1
    between = steps[:-1][~long[:-1]]  # half a window, and what is cut of the pauses in it
    assert between.min() == pytest.approx(1.28)
    assert between.max() < 1.6
    assert (course["voiced"] > 0.3).all()
    assert course["predicted"].iloc[0] == "angry"
    assert course["predicted"].iloc[-1] == "calm"

    by_window = course[listener.classes]
    expected = np.average(by_window, axis=0, weights=course["voiced"])
    answer = listener.predict(samples, RATE)
    assert np.allclose(answer[listener.classes], expected)
    assert not np.allclose(by_window.mean(), expected, atol=1e-3)


def test_a_long_recording_without_speech_is_silent_from_its_beginning_on(listener, monkeypatch):
    monkeypatch.setattr(er, "PART", 5)
    course = listener.predict_over_time(np.zeros(12 * RATE), RATE)
    assert list(course["start"]) == [0, 5, 10]
    assert list(course["end"]) == [5, 10, 12]
    assert set(course["predicted"]) == {"no speech"}
    assert list(listener.predict(np.zeros(12 * RATE), RATE)["predicted"]) == ["no speech"]


def test_up_to_six_seconds_are_one_window(listener):
    samples = np.resize(speech(), 7 * RATE)
    short = listener.predict_over_time(samples[:5 * RATE], RATE)
    long = listener.predict_over_time(samples, RATE)
    assert len(short) == 1
    assert len(long) > 3


def table_of_answers(name="own"):
    """The path of the table that --phase predict leaves for an input of this name."""
    path, = RECORDINGS.glob(f"{name}-*.csv")
    return path


def read_answers(name="own"):
    """The table that --phase predict leaves for an input of this name; empty cells are empty texts."""
    return pd.read_csv(table_of_answers(name), keep_default_na=False)


def test_a_folder_is_answered_file_by_file(copied):
    written("own/deeper/a b.wav", speech())
    long = ["deeper/long.wav", "deeper_long.wav", "long.wav"]
    for name in long:
        written(f"own/{name}", np.tile(speech(), 8))
    touch("own", "broken.mp3", "notes.txt")
    er.main([*PREDICTING, "own"])

    table = read_answers()
    assert list(table["recording"].unique()) == ["broken.mp3", "deeper/a b.wav", *long]
    broken, *good = table.to_dict("records")
    assert "not readable" in broken["error"]
    for line in good:
        assert line["error"] == ""
        assert line["predicted"] in er.EMOTIONS
        assert "synthetic" in line["caveats"]

    courses = {line["recording"]: Path(line["over_time"]) for line in good if line["over_time"]}
    assert list(courses) == long
    assert set(RECORDINGS.rglob("*.csv")) == {*courses.values(), table_of_answers()}
    for path in courses.values():
        course = pd.read_csv(path)
        assert len(course) > 5
        plot = path.with_suffix(".png")
        assert plot.stat().st_size > 10000


def asked_as_json(capsys, *argv):
    """The answers that --phase predict --json prints, a document of each recording a line, nothing beside."""
    capsys.readouterr()
    er.main([*PREDICTING, *argv, "--json"])
    documents = map(json.loads, capsys.readouterr().out.splitlines())
    return list(itertools.chain.from_iterable(documents))


@pytest.mark.parametrize("broken", ["", "at the end.wav", "at first.wav"])
def test_json_csv_and_console_are_views_of_one_table(broken, copied, capsys):
    if broken:
        touch("own", broken)
    written("own/at last.wav", speech())
    command = ["own", "--text", "What a day."]
    lines = asked_as_json(capsys, *command)
    for line in lines:
        assert list(line) == COLUMNS

    table = read_answers()
    assert list(table) == COLUMNS
    assert list(table["recording"]) == [line["recording"] for line in lines]
    assert list(table["model"]) == [line["model"] or "" for line in lines]

    table_of_answers().unlink()
    er.main([*PREDICTING, *command])
    shown = capsys.readouterr().out
    for line in lines:
        if line["error"]:
            assert f"{line['recording']}: {line['error']}\n" in shown
        else:
            share = line[line["predicted"]]
            assert line["predicted"] in shown
            assert f"{share:.1%}" in shown
    assert shown.count(ORACLE) == len(SHOWN) - len(WORDLESS)
    assert "synthetic demo corpus" in shown.splitlines()[-1]


def test_a_folder_of_broken_files_is_a_table_too(copied, capsys):
    touch("own", "a.wav", "b.mp3")
    lines = asked_as_json(capsys, "own")
    assert [line["recording"] for line in lines] == ["a.wav", "b.mp3"]
    for line in lines:
        assert "not readable" in line["error"]
        assert set(line) == set(COLUMNS)


def test_json_is_one_document_and_nothing_else(copied, capsys):
    written("a.wav", speech())
    DEMO_WHISPER.rename("away.pt")
    alone = asked_as_json(capsys, "a.wav")
    Path("away.pt").rename(DEMO_WHISPER)
    together = asked_as_json(capsys, "a.wav", "--text", "What a day.")
    assert [line["model"] for line in alone] == ["AudioCNN"]
    titles = [TITLES[name] for name in in_order(er.Predictor(OUTPUT))]
    assert [line["model"] for line in together] == titles
    for line in [*alone, *together]:
        assert set(line) == set(COLUMNS)
        assert line["recording"] == "a.wav"
        assert line["error"] == ""
        probabilities = {emotion: line[emotion] for emotion in er.EMOTIONS}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert line["predicted"] == max(probabilities, key=probabilities.get)
    for line in together:
        assert line["text"] == "What a day."
        assert line["text_source"] == "--text"

    written("silent.wav", np.zeros(32000))
    line, = asked_as_json(capsys, "silent.wav")
    assert line["predicted"] == "no speech"
    assert line["happy"] is None


def test_prediction_needs_nothing_but_checkpoints(copied):
    for path in OUTPUT.rglob("*.*"):
        if path.is_file() and path.suffix != ".pth":
            path.unlink()
    shutil.rmtree("archive")
    written("a.wav", speech())
    done = run_script(*PREDICTING, "a.wav", "--text", "What a day.")
    assert done.returncode == 0, done.stderr
    assert "a.wav: " in done.stdout
    assert "##" in done.stdout
    names = [name for name in SHOWN if "speech" not in name]  # which needs Whisper's weights
    for name in names:
        assert TITLES[name] in done.stdout
    assert "SpeechEncoder" not in done.stdout
    assert done.stdout.count(ORACLE) == len(names) - 1
    warning, _ = done.stderr.splitlines()
    assert warning.startswith(f"warning: --whisper-model {DEMO_WHISPER} cannot be loaded")
    assert "Words: --text: 'What a day.'" in done.stdout
    assert "Warning" not in done.stderr


def change(name, key, value):
    """Change a value in the checkpoint of a system of the demo, or some of its items; the path."""
    path = OUTPUT / f"{er.SYSTEMS[name].file}_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    if isinstance(value, dict):
        assert value.keys() <= checkpoint[key].keys()
        value = checkpoint[key] | value
    torch.save(checkpoint | {key: value}, "other.pth")
    shutil.move("other.pth", path)
    return path


def answer_of_the_demo():
    """What the models in outputs/demo answer to a clip and its words."""
    predictor = er.Predictor(OUTPUT)
    return predictor.predict(speech(), RATE, text="What a day.")


@pytest.mark.parametrize("key", ["cnn", "rnn", "clips", "seed"])
def test_a_fused_model_that_does_not_fit_its_parts_is_passed_over(key, copied, capsys):
    path = change("fusion_rnn", "fingerprint", {key: "9"})
    predictor = er.Predictor(OUTPUT)
    others = answering(TITLES.keys() - {"fusion_rnn"})
    for text in ("What a day.", "Well."):
        answer = predictor.predict(speech(), RATE, text=text)
        assert set(answer.index) == others
    warning, = capsys.readouterr().err.splitlines()  # once, not at every answer
    assert warning.startswith(f"warning: {path} was not trained with the models beside it ({key} ")


def test_a_damaged_model_is_passed_over(copied, capsys):
    cut(OUTPUT / "TextRNN_best.pth", 5000)
    answer = answer_of_the_demo()
    made_of_it = {"rnn", "late_rnn", "learned_rnn", "late_speech_rnn", "learned_speech_rnn"}
    assert set(answer.index) == answering(TITLES.keys() - made_of_it)
    assert "TextRNN_best.pth is not a usable checkpoint" in capsys.readouterr().err


def test_audio_cnn_trained_anew_alone_leaves_nothing_that_was_made_with_the_old_one(
        copied, unpublished, capsys):
    er.main([*DEMO, "--phase", "unimodal", "--run-models", "cnn", "--dropout", "0.3"])
    capsys.readouterr()
    answer = answer_of_the_demo()
    assert set(answer.index) == answering(set(SHOWN) - set(FUSED))
    warnings = capsys.readouterr().err
    assert warnings.count("with the models beside it (cnn changed)") == 4


@pytest.fixture
def double_precision():
    """A notebook in which torch makes float64 by default."""
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


def test_another_default_precision_in_a_notebook_changes_no_answer(copied, double_precision):
    found = er.Predictor(OUTPUT).predict(speech(), RATE, text="I am so happy.")
    torch.set_default_dtype(torch.float32)
    expected = er.Predictor(OUTPUT).predict(speech(), RATE, text="I am so happy.")
    torch.set_default_dtype(torch.float64)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_another_default_precision_in_a_notebook_changes_no_training(unpublished, double_precision):
    flags = [*own_corpus(["happy", "sad"]), "--run-models", "cnn"]
    er.main([*flags, "--output-dir", "double"])
    torch.set_default_dtype(torch.float32)
    er.main([*flags, "--output-dir", "single"])
    torch.set_default_dtype(torch.float64)
    double, single = (er.read_checkpoint(config(output_dir=name), "cnn") for name in ("double", "single"))
    assert torch.equal(double.log_probs, single.log_probs)


@pytest.mark.parametrize(("text", "strange"), [
    ("I am so happy.", False), ("Zxqv!", True), ("我很开心", True), ("", True)])
def test_words_that_are_all_unknown_are_said_beside_the_answers(text, strange, finished, monkeypatch):
    monkeypatch.chdir(finished)
    notes = er.Predictor(OUTPUT).predict(speech(), RATE, text=text)["note"]
    marked = notes.str.contains("it knows none of these words")
    assert marked["TextRNN"] == strange
    assert marked["Late fusion, RNN"] == strange
    assert not marked[["AudioCNN", "TextBERT"]].any()


def test_each_answer_says_what_its_own_words_were(copied):
    change("rnn", "words", "whisper")
    notes = answer_of_the_demo()["note"]
    without = notes[notes == ""]
    of_rnn = "rnn", "late_rnn", "learned_rnn", "late_speech_rnn", "learned_speech_rnn"
    assert set(without.index) == answering([*WORDLESS, *of_rnn])
    assert set(notes) == {"", ORACLE}


def test_answers_of_models_that_other_code_trained_say_so(copied, capsys):
    change("fusion_rnn", "fingerprint", {"code": "of yesterday"})
    written("own/a.wav", speech())
    er.main([*PREDICTING, "own"])
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "trained by other code" in last_line
    caveats, = set(read_answers()["caveats"])
    assert "trained by other code" in caveats


def test_models_of_an_earlier_version_that_knew_fewer_settings_answer(copied):
    for path in OUTPUT.glob("*_best.pth"):
        content = torch.load(path, weights_only=True)
        del content["fingerprint"]["channel"], content["settings"]["channel"]
        torch.save(content, path)
    assert er.Predictor(OUTPUT).predict(speech(), RATE)["predicted"].iloc[0] in er.EMOTIONS


def test_models_that_read_alone_answer_with_words_and_ask_for_them(copied, capsys):
    for path in OUTPUT.glob("*.pth"):
        if path.name != "TextRNN_best.pth":
            path.unlink()
    written("a.wav", np.tile(speech(), 8))
    DEMO_WHISPER.unlink()  # which would say what it heard
    with pytest.raises(er.UserError, match="all models of outputs/demo read words: say with --text"):
        er.main([*PREDICTING, "a.wav"])
    capsys.readouterr()
    er.main([*PREDICTING, "a.wav", "--text", "What a day."])
    output = capsys.readouterr()
    assert "Words: --text: 'What a day.'" in output.out
    assert "say with --text" not in output.err


@pytest.fixture
def asked(copied, request):
    """The command line of predicting, or of evaluating, with the models of the finished demo."""
    if request.param == "predict":
        written("a.wav", speech())
        return [*PREDICTING, "a.wav"]
    own_corpus(["happy", "sad"], [7], transcript=lambda *_: "So it is.")
    return ["--output-dir", str(OUTPUT), "--manifest", "own/corpus.csv", "--phase", "evaluate"]


EVALUATE = pytest.mark.parametrize("asked", ["evaluate"], indirect=True)
PREDICT_ALONE = pytest.mark.parametrize("asked", ["predict"], indirect=True)


@PREDICT_ALONE
@pytest.mark.parametrize("flag", [
    *("--epochs-cnn=1", "--n-mels=64", "--seed=42", "--folds=0", "--run-models=cnn", "--reuse-edited"),
    *("--no-use-simulated-sentences", "--clip-seconds=2.56", "--bert-model=copy", "--leave-out=sad"),
])
def test_flags_that_change_no_answer_are_refused_by_predict(asked, flag):
    with pytest.raises(er.UserError, match=f"--phase predict has no use for {flag}: "):
        er.main([*asked, flag])


@EVALUATE
def test_flags_that_contradict_the_models_are_refused(asked, capsys):
    before = contents(OUTPUT)
    contradictions = {
        "--epochs-fusion=3": "1",
        "--epochs-cnn=2": "1",
        "--n-mels=80": "64",
        "--fusion=concat": "'both'",
        "--no-use-simulated-sentences": "True",
        "--run-models=cnn": "'cnn,speech,rnn,bert,fusion_rnn,fusion_bert'",
        "--speech-c=1.0": "0.003",
        "--seed=7": "42",
        "--folds=1": "'0'",
        "--sentence-noise=0.5": "0.0",
        "--batch-size=8": "32",
        "--learning-rate-cnn=0.1": "0.002",
        "--sentences-csv=s.csv": "''",
        "--bert-model=no/one": f"'{ENCODER}'",
    }
    for flag, found in contradictions.items():
        sentence = f"{flag} contradicts {OUTPUT}, made with {found}"
        with pytest.raises(er.UserError, match=re.escape(sentence)):
            er.main([*asked, flag])
    assert contents(OUTPUT) == before
    assert capsys.readouterr().out == ""


@EVALUATE
def test_flags_that_agree_with_the_models_or_shape_no_training_are_free(asked, unpublished, capsys):
    shutil.copytree(ENCODER, "copy")  # of the same content
    agreeing = [*TINY, "--fusion", "both", "--bert-model", "copy"]
    free = ["--test-views", "2", "--reuse-edited", "--output-dir", f"./{OUTPUT}"]
    er.main([*asked, *agreeing, *free])
    assert "warning" not in capsys.readouterr().err


@EVALUATE
def test_another_text_encoder_of_the_same_kind_is_refused(asked):
    shutil.copytree(ENCODER, "other")
    weights = bytearray(Path("other/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("other/model.safetensors").write_bytes(weights)
    with pytest.raises(er.UserError, match=f"--bert-model=other contradicts {OUTPUT}, made with '{ENCODER}'"):
        er.main([*asked, "--bert-model", "other"])


@EVALUATE
def test_the_flags_of_the_training_stay_right_when_the_encoder_is_gone(asked, unpublished):
    shutil.rmtree("archive")
    er.main([*asked, "--bert-model", str(ENCODER)])


def test_an_answer_that_cannot_be_written_is_still_given(copied, capsys):
    written("own/long.wav", np.tile(speech(), 8))
    touch(".", str(RECORDINGS))  # a file, where a folder should be
    er.main([*PREDICTING, "own", "--json"])
    output = capsys.readouterr()
    lines = json.loads(output.out)
    assert [line["model"] for line in lines] == [TITLES[name] for name in in_order(er.Predictor(OUTPUT))]
    for line in lines:
        assert line["predicted"] in er.EMOTIONS
        assert line["over_time"] == ""
    warnings = output.err.splitlines()
    assert len(warnings) == 2
    for warning in warnings:
        assert warning.startswith("warning: outputs/demo/recordings/")
        assert "cannot be written" in warning


def test_names_and_words_that_are_no_text_are_answered(copied, capsys):
    names = ["b" * 240 + ".wav", "folder.wav/c.wav"]
    samples = np.tile(speech(), 8)
    for name in [*names, ".hidden.wav"]:
        written(f"own/{name}", samples)
    broken, words = os.fsdecode(b"a\xff.wav"), os.fsdecode(b"\xff hi")
    touch("own", broken)
    er.main([*PREDICTING, "own", "--text", words])
    assert "Words: --text: '? hi'" in capsys.readouterr().out

    table = read_answers()
    failed = table.query("error != ''")
    good = table.drop(failed.index)
    assert list(failed["recording"]) == ["a?.wav"]
    assert set(good["recording"]) == set(names)
    plots = list(RECORDINGS.rglob("*.png"))
    assert len(plots) == len(names)


def test_a_recording_that_cannot_be_used_or_found_ends_with_a_sentence(copied):
    touch(".", "a.wav", "empty/notes.txt")
    reasons = {
        "a.wav": "a.wav cannot be used (not readable",
        "b.wav": "--input 'b.wav' does not exist",
        "empty": "--input 'empty' holds no recordings",
        "": "--input ''",
    }
    for name, reason in reasons.items():
        with pytest.raises(er.UserError, match=re.escape(reason)):
            er.main([*PREDICTING, name])


def test_a_folder_without_models_has_no_answer():
    with pytest.raises(er.UserError, match="none holds no trained model: train with --phase all"):
        er.Predictor("none")
    assert not Path("none").exists()


def test_a_single_run_beside_a_newer_cross_validation_does_not_answer(copied):
    path = OUTPUT / "config.json"
    single = read_json(path)
    calibration, = single["calibration"].values()
    several = {"{'fold': 0, 'seed': 42}": calibration, "{'fold': 1, 'seed': 42}": calibration}
    of_folds = single["settings"] | {"folds": "0,1"}
    er.save(path, single | {"calibration": several, "settings": of_folds})
    touch(OUTPUT, "fold_0_seed_42/AudioCNN_best.pth")
    with pytest.raises(er.UserError, match=r"several runs: name one of them, --output-dir .*fold_0_seed_42"):
        er.Predictor(OUTPUT)

    er.save(path, single)  # now the single run is newer
    predictor = er.Predictor(OUTPUT)
    assert predictor.classes == er.EMOTIONS


@pytest.fixture
def whispers(copied, monkeypatch):
    """What is done with Whisper, whose every checkpoint has the demo's encoder and hears the same words.

    `loaded` are the names of checkpoints; `decoded` says for each decoding how many tokens it may have.
    """
    import whisper
    heard = SimpleNamespace(text=" What a day.", no_speech_prob=0.1, avg_logprob=-0.3, compression_ratio=1.0)
    done, load = SimpleNamespace(loaded=[], decoded=[]), whisper.load_model

    def decode(mel, options):
        done.decoded.append(options.sample_len)
        return heard

    def load_model(name, device):
        """What whisper.load_model does, without a checkpoint of this name."""
        done.loaded.append(name)
        model = load(str(DEMO_WHISPER), device)
        model.decode = decode
        return model
    monkeypatch.setattr(whisper, "load_model", load_model)
    return done


def test_whisper_is_found_by_the_name_of_its_file_and_loaded_once(whispers):
    touch("cache/whisper", "large-v3-turbo.pt")
    for name in ("a", "b"):
        written(f"own/{name}.wav", speech())
    er.main([*PREDICTING, "own", "--whisper-model", "turbo"])
    assert whispers.loaded == ["turbo"]

    table = read_answers()
    counts = table["recording"].value_counts()
    assert counts.to_dict() == {"a.wav": len(SHOWN), "b.wav": len(SHOWN)}
    assert set(table["text_source"]) == {"Whisper turbo"}


def test_whisper_is_asked_only_when_its_weights_are_there_and_for_words_when_there_are_none(whispers, capsys):
    place_of("speech").unlink()  # which would fetch them
    written("a.wav", speech())
    DEMO_WHISPER.rename("away.pt")
    line, = asked_as_json(capsys, "a.wav")
    assert line["model"] == "AudioCNN"
    assert "audio alone" in line["text_source"]
    assert line["text"] is None
    assert line["gate"].startswith("level, ")
    assert whispers.loaded == []

    Path("away.pt").rename(DEMO_WHISPER)
    command = ["a.wav", "--whisper-model", "base"]
    lines = asked_as_json(capsys, *command, "--text", "Well.")
    assert {line["text"] for line in lines} == {"Well."}
    assert whispers.decoded == [1]  # whether there is speech
    lines = asked_as_json(capsys, *command)
    assert whispers.decoded == [1, 1, None]
    assert whispers.loaded == ["base"]
    assert {line["model"] for line in lines} == {TITLES[name] for name in SHOWN if "speech" not in name}
    for line in lines:
        assert line["text"] == "What a day."
        assert line["text_source"] == "Whisper base"
        assert line["gate"].startswith("Whisper, no-speech probability 0.10")


# %% Batches of recordings
@pytest.fixture
def batch(copied, capsys):
    """The command that answers three recordings by AudioCNN alone."""
    for name in ("a", "b", "c"):
        written(f"own/{name}.wav", speech())
    return [*PREDICTING, "own", "--ask-systems", "cnn"]


@pytest.fixture
def served(monkeypatch):
    """The names of the recordings that are answered from here on."""
    names, answer = [], er.answer_recording
    monkeypatch.setattr(er, "answer_recording", lambda recording, *rest: (
        names.append(recording.name), answer(recording, *rest))[1])
    return names


def fail_at(patch, error, name):
    """Let a recording with this name raise an error where it is read."""
    opened = er.open_sound

    def open_sound(path):
        if Path(path).name == name:
            raise error
        return opened(path)

    patch.setattr(er, "open_sound", open_sound)


@pytest.mark.parametrize(("error", "reason"), [
    (MemoryError(), "MemoryError"),
    (RuntimeError("CUDA error:\nmisaligned address"), "CUDA error: misaligned address"),
    (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), "surrogates not allowed"),
    (er.UserError("--whisper-language xx is none"), "--whisper-language xx is none"),
    (ZeroDivisionError("by zero"), "by zero"),
])
def test_one_file_never_ends_a_batch_and_a_single_one_ends_with_its_sentence(
        error, reason, batch, monkeypatch):
    fail_at(monkeypatch, error, "b.wav")
    er.main(batch)
    table = read_answers()
    assert list(table["recording"]) == ["a.wav", "b.wav", "c.wav"]
    assert reason in table["error"][1]
    assert list(table["predicted"] != "") == [True, False, True]
    with pytest.raises(er.UserError, match=reason.split(":")[0]):
        er.main([*PREDICTING, "own/b.wav"])


def after_a_stop(batch, monkeypatch):
    """Stop a batch with Ctrl-C as its third recording is answered."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "answer_recording", 3)
        er.main(batch)


@pytest.mark.parametrize(("change", "again"), [
    ("nothing", ["c.wav"]),
    ("a kill cut the last line", ["b.wav", "c.wav"]),
    ("a kill cut a quoted cell", ["b.wav", "c.wav"]),
    ("other bytes", ["a.wav", "c.wav"]),
    ("other settings", ["a.wav", "b.wav", "c.wav"]),
    ("other code", ["a.wav", "b.wav", "c.wav"]),
    ("another kind of file", ["a.wav", "b.wav", "c.wav"]),
])
def test_a_batch_that_was_stopped_goes_on_where_it_stopped(change, again, batch, served, monkeypatch, capsys):
    after_a_stop(batch, monkeypatch)
    path = table_of_answers()
    assert list(read_answers()["recording"]) == ["a.wav", "b.wav"]
    changes = {
        "a kill cut the last line": lambda: path.write_text(path.read_text()[:-30]),
        "a kill cut a quoted cell": lambda: path.write_text(path.read_text()[:-30] + '"'),
        "other bytes": lambda: written("own/a.wav", speech()[:-100]),
        "other settings": lambda: batch.extend(["--test-views", "1"]),
        "other code": lambda: monkeypatch.setattr(er, "source_code", lambda: "other"),
        "another kind of file": lambda: path.write_bytes(b"\xff\0"),
    }
    changes.get(change, lambda: None)()
    served.clear()
    capsys.readouterr()
    er.main(batch)
    assert served == again
    assert f"{3 - len(again)} of 3 answered before" in capsys.readouterr().err
    assert sorted(read_answers()["recording"]) == ["a.wav", "b.wav", "c.wav"]
    assert path.read_bytes().endswith(b"\n")


def test_a_column_without_a_name_is_passed_over_and_answers_are_kept(batch, served):
    pd.DataFrame({"path": ["own/a.wav", "own/b.wav"]}).to_csv("list.csv")
    command = [*PREDICTING, "list.csv", "--ask-systems", "cnn"]
    er.main(command)
    er.main(command)
    assert served == ["own/a.wav", "own/b.wav"]  # once


def test_errors_are_tried_again(batch, served, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, MemoryError(), "b.wav")
        er.main(batch)
    served.clear()
    er.main(batch)
    assert served == ["b.wav"]
    assert set(read_answers()["error"]) == {""}


def test_json_of_a_batch_is_printed_as_answers_come(batch, monkeypatch, capsys):
    after_a_stop([*batch, "--json"], monkeypatch)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [first[0]["recording"], second[0]["recording"]] == ["a.wav", "b.wav"]


def test_a_pipe_that_is_closed_ends_quietly(batch):
    script = subprocess.Popen([sys.executable, str(SCRIPT), *batch, "--json"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    script.stdout.readline()
    script.stdout.close()
    said = script.stderr.read()
    assert script.wait() == 1
    assert "error" not in said.lower() and "Traceback" not in said


def test_what_is_not_answered_of_a_folder_is_counted_by_reason(batch, served, capsys):
    touch("own", "a.txt", "b.TXT", "deeper/c.jpg", "README", ".hidden.wav")
    Path("own/gone.wav").symlink_to("nowhere.wav")
    er.main(batch)
    said = capsys.readouterr().err
    assert "Not answered: .jpg 1, .txt 2, broken link 1, hidden 1, no suffix 1\n" in said
    assert served == ["a.wav", "b.wav", "c.wav"]


@pytest.mark.parametrize("suffix", [".oga", ".w64", ".amr", ".3gp"])
def test_recordings_of_phones_and_of_long_sessions_are_answered(suffix):
    touch("own", f"a{suffix}")
    recording, = er.recordings_in(config(input="own"))
    assert recording.name == f"a{suffix}"


def test_links_to_folders_are_followed_once(batch, served):
    written("elsewhere/d.wav", speech())
    for name in ("link", "other link"):
        Path("own", name).symlink_to("../elsewhere", target_is_directory=True)
    Path("elsewhere/back").symlink_to("../own", target_is_directory=True)
    er.main(batch)
    assert served == ["a.wav", "b.wav", "c.wav", "link/d.wav"]


def test_each_input_has_its_own_table_also_a_single_file(copied, capsys):
    for path in ("one/own/a.wav", "two/own/a.wav"):
        written(path, np.tile(speech(), 8))
        er.main([*PREDICTING, str(Path(path).parent)])
    er.main([*PREDICTING, "one/own/a.wav"])
    assert len(list(RECORDINGS.glob("own-*.csv"))) == 2
    assert len(list(RECORDINGS.rglob("a.wav-*.png"))) == 3
    assert set(read_answers("a.wav")["recording"]) == {"a.wav"}
    # Three bytes a letter, and names have 255 at most.
    written(f"one/own/{'語' * 80}.wav", np.tile(speech(), 8))
    capsys.readouterr()
    er.main([*PREDICTING, f"one/own/{'語' * 80}.wav"])
    assert "warning" not in capsys.readouterr().err


def test_where_the_models_cannot_be_written_to_answers_go_to_the_working_folder(batch, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != OUTPUT)
    er.main(batch)
    assert not RECORDINGS.exists()
    path, = Path("recordings").glob("own-*.csv")
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(("pattern", "names"), [
    ("own/[ab].wav", ["own/a.wav", "own/b.wav"]),
    ("own/**/*.wav", ["own/a.wav", "own/b.wav", "own/c.wav", "own/deeper/d.wav"]),
    ("own/[d].wav", ["[d].wav"]),
])
def test_a_pattern_names_recordings_unless_a_file_has_that_name(pattern, names, batch):
    written("own/deeper/d.wav", speech())
    written("own/[d].wav", speech()[:-100])
    found = [recording.name for recording in er.recordings_in(config(input=pattern))]
    assert [name for name in found if "[" not in name or "[d]" in pattern] == names


def test_a_table_of_recordings_says_words_and_seconds_and_keeps_its_columns(copied, capsys):
    written("own/talk.wav", np.tile(speech(), 8))
    Path("own/calls.csv").write_text(
        "path,start,end,text,caller\n"
        "talk.wav,,,,Ann\n"
        "talk.wav,1.5,3,What a day.,Bob\n"
        "talk.wav,x,3,,Eve\n"
        "gone.wav,,,,Eve\n")
    er.main([*PREDICTING, "own/calls.csv"])
    table = read_answers("calls.csv")
    assert list(table["recording"].unique()) == ["talk.wav", "talk.wav 1.5 3", "talk.wav x 3", "gone.wav"]
    assert list(table.columns[-6:]) == ["path", "start", "end", "caller", "caveats", "key"]
    callers = table.groupby("recording")["caller"].first()
    assert callers["talk.wav"] == "Ann" and callers["talk.wav 1.5 3"] == "Bob"
    errors = table.groupby("recording")["error"].first()
    assert "'x'" in errors["talk.wav x 3"] and "does not exist" in errors["gone.wav"]
    assert not errors["talk.wav"] and not errors["talk.wav 1.5 3"]
    part = table[table["recording"] == "talk.wav 1.5 3"]
    assert set(part["text"]) == {"What a day."}
    said = np.tile(speech(), 8)[RATE * 3 // 2:3 * RATE]
    alone = er.Predictor(OUTPUT).predict(said, RATE, text="What a day.")
    assert np.allclose(part["sad"].astype(float), alone["sad"], atol=1e-3)


def test_columns_of_a_table_of_recordings_that_answers_have_too_are_not_lost(copied):
    written("own/a.wav", speech())
    Path("own/calls.csv").write_text("path,note,text,happy\na.wav,mine,What a day.,0.3\n")
    with pytest.raises(er.UserError, match="has columns that answers have too, happy, note: rename them"):
        er.main([*PREDICTING, "own/calls.csv"])


def test_a_model_hears_with_its_own_encoder_whatever_was_trained_later(copied):
    before = er.Predictor(OUTPUT, ask_systems="speech").predict(speech(), RATE)
    for name in er.TRAINED.keys() - {"cnn", "speech"}:
        path = er.file_of(config(output_dir=str(OUTPUT)), name)
        content = torch.load(path, weights_only=True)
        content["settings"]["whisper_model"] = "other.pt"
        torch.save(content, path)
    predictor = er.Predictor(OUTPUT, ask_systems="speech")
    assert predictor.cfg.whisper_model == str(DEMO_WHISPER)
    pd.testing.assert_frame_equal(predictor.predict(speech(), RATE), before)


@pytest.mark.parametrize("key", ["n_mels", "n_fft"])
def test_models_that_hear_other_log_mels_are_not_joined(key, copied, capsys):
    cfg = config(output_dir=str(OUTPUT))
    path = er.file_of(cfg, "speech")
    content = torch.load(path, weights_only=True)
    content["fingerprint"][key] = "128"
    torch.save(content, path)
    assert "speech" not in er.checkpoints_together(cfg)
    assert f"({key} 128 -> " in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [math.nan, 5, ["a"]])
def test_a_text_that_is_none_is_refused(wrong, predictor):
    with pytest.raises(er.UserError, match="is no text: say as a str what is said"):
        predictor.predict(speech(), RATE, text=wrong)


@pytest.mark.parametrize("device", [None, 0, "gpu"])
def test_the_device_of_a_predictor_is_checked(device, finished):
    with pytest.raises(er.UserError, match="--device"):
        er.Predictor(finished / OUTPUT, device=device)
    assert er.Predictor(finished / OUTPUT, device=torch.device("cpu")).device == "cpu"


def test_a_long_silence_is_no_speech_whatever_its_last_moment(predictor):
    silence = np.zeros(round((er.PART + 0.1) * RATE), np.float32)
    assert set(predictor.predict(silence, RATE)["predicted"]) == {er.NO_SPEECH}


def test_the_path_of_a_listed_recording_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("calls.csv").write_text("path\n~/a.wav\n")
    recording, = er.recordings_in(config(input="calls.csv"))
    assert recording.path == Path("a.wav").absolute()


def test_windows_of_a_part_of_a_recording_are_dated_in_the_whole(listener):
    written("talk.wav", np.resize(speech(), 30 * RATE))
    windows, _ = listener.hear("talk.wav", span=(10, 20))
    assert 10 <= windows["start"].min() < 10.5
    assert 19 < windows["end"].max() <= 20.2


@pytest.mark.parametrize("names", ["cnn", "rnn,cnn", "late_rnn"])
def test_those_who_are_asked_answer_and_nobody_else(names, copied, capsys):
    written("a.wav", speech())
    lines = asked_as_json(capsys, "a.wav", "--text", "What a day.", "--ask-systems", names)
    assert {line["model"] for line in lines} == answering(names.split(","))
    whole = asked_as_json(capsys, "a.wav", "--text", "What a day.")
    values = {line["model"]: line["happy"] for line in whole}
    for line in lines:
        assert line["happy"] == pytest.approx(values[line["model"]], abs=1e-6)


@pytest.mark.parametrize("names", ["cnnn", "cnn,attention_bert_", "AudioCNN"])
def test_an_unknown_system_that_is_asked_is_an_error_with_those_there_are(names, copied):
    written("a.wav", speech())
    with pytest.raises(er.UserError, match=rf"--ask-systems {names} .* cnn, speech, "):
        er.main([*PREDICTING, "a.wav", "--ask-systems", names])


def test_a_model_of_whisper_that_is_mistyped_is_an_error(copied):
    written("a.wav", speech())
    with pytest.raises(er.UserError, match="--whisper-model basee cannot be loaded"):
        er.main([*PREDICTING, "a.wav", "--whisper-model", "basee"])


@pytest.mark.benchmark
def test_a_clip_of_four_seconds_is_answered_in_a_hundredth_of_its_time(demo):
    predictor = er.Predictor(demo[0].output_dir, test_views=1)  # AudioCNN alone: no Whisper is found
    written("a.wav", np.resize(speech(), 4 * RATE))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        predictor.predict("a.wav")
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    print(f"\nprediction: {1000 * best:.1f} ms for 4 s: {4 / best:.0f} times real time")
    assert best <= 0.04


# %% A clip gets one answer
def surrounded(emotions, files=12):
    """Write files of 26 s, one emotion around a clip of another in the exact middle, and long/corpus.csv.

    Returns that table: path, emotion, speaker, transcript. The middle alone is at middle/path.
    """
    rng, lines = np.random.default_rng(1), []
    for number in range(files):
        outer, inner = np.roll(emotions, number)
        speaker = 10 + number
        middle = er.synthesize(inner, speaker, rng, RATE)
        room = 13 * RATE - len(middle) // 2
        side = np.resize(er.synthesize(outer, speaker, rng, RATE), room)
        name = f"{number:02}.wav"
        written(f"middle/{name}", middle)
        written(f"long/{name}", np.concatenate([side, middle, side]))
        lines.append((name, outer, speaker, f"It is {outer}."))
    table = pd.DataFrame(lines, columns=["path", "emotion", "speaker", "transcript"])
    table.to_csv("long/corpus.csv", index=False)
    return table


def evaluate_long(folder, views):
    """The predictions of --phase evaluate on long/corpus.csv, with the models of a folder."""
    command = ["--manifest", "long/corpus.csv", "--phase", "evaluate", "--output-dir", str(folder)]
    er.main([*command, "--test-views", str(views)])
    return predictions(Path(folder, "evaluation_corpus"))


def assert_same_answers(table, lines, predictor):
    """Every system of a table of predictions answers each of some lines as the predictor does."""
    shared = [emotion for emotion in predictor.classes if emotion in table]
    for line in lines.itertuples():
        answer = predictor.predict(f"long/{line.path}", text=line.transcript)
        rows = table[(table["clip"] == line.path) & (table["system"] != "speech_adapted")]
        titles = rows["system"].map(TITLES)
        assert sorted(titles) == sorted(answer.index)
        probabilities = answer.loc[titles, shared]
        shares = probabilities.div(probabilities.sum(axis=1), axis=0)
        assert np.allclose(shares, rows[shared], atol=1e-5), line.path


def test_a_long_file_gets_the_answer_of_its_windows_by_evaluation_and_prediction(learned, unpublished):
    shutil.copytree(learned / "outputs", "outputs")
    lines = surrounded(["angry", "calm"])
    table = evaluate_long("outputs", views=1)
    predictor = er.Predictor("outputs", test_views=1)
    assert set(table["system"]) == {"cnn", "rnn", "late_rnn", "learned_rnn"}
    assert_same_answers(table, lines, predictor)

    heard = said_by("cnn", table).set_index("clip")
    assert list(heard["predicted"]) == list(lines["emotion"])
    for line in lines.itertuples():
        middle = predictor.predict(f"middle/{line.path}")
        assert list(middle["predicted"]) != [line.emotion]  # it would mislead whoever hears it alone

    for name in lines["path"].head(3):
        course = predictor.predict_over_time(f"long/{name}")
        by_window = course[predictor.classes]
        assert len(course) > 15
        assert np.ptp(by_window["angry"]) > 0.2
        expected = np.average(by_window, axis=0, weights=course["voiced"])
        answer = heard.loc[name]
        found = [answer[emotion] for emotion in predictor.classes]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_all_models_of_the_demo_give_a_long_file_one_answer(copied, unpublished):
    lines = surrounded(["angry", "calm"], files=2)
    table = evaluate_long(OUTPUT, views=5)
    assert set(table["system"]) == set(SCORED)
    assert_same_answers(table, lines, er.Predictor(OUTPUT))


def test_temperatures_are_fitted_on_windows_each_labelled_as_its_clip(learned, listener):
    calibration, = read_json(learned / "outputs/config.json")["calibration"].values()
    temperature = calibration["cnn"]
    clips = pd.read_csv(learned / "outputs/clips.csv").query("split == 'validation'")
    labels = clips["emotion"].map(listener.classes.index)
    by_window, by_clip, sizes = [], [], []
    for path in clips["path"]:
        course = listener.predict_over_time(learned / path)
        answers = course[listener.classes]
        sizes.append(len(answers))
        by_window.append(answers)
        by_clip.append(np.average(answers, axis=0, weights=course["voiced"]))
    assert max(sizes) > 3

    def fitted(answers, labels):
        """The temperature of answers that were divided by the temperature of the training."""
        logits = torch.from_numpy(np.log(answers) * temperature)
        return er.fit_temperature(logits, torch.tensor(list(labels)))

    of_windows = fitted(np.concatenate(by_window), np.repeat(labels, sizes))
    of_clips = fitted(np.stack(by_clip), labels)
    assert of_windows == pytest.approx(temperature, rel=0.02)
    assert of_clips < 0.8 * temperature


def test_voice_weights_windows_and_excludes_no_clip():
    windows = pd.DataFrame(
        [("b", 0), ("b", 0), ("a", 0.25), ("a", 0.75), ("a", 0)],
        columns=["clip", "voiced"])
    probabilities = torch.tensor([
        [0.9, 0.1],
        [0.5, 0.5],
        [0.2, 0.8],
        [0.6, 0.4],
        [0.99, 0.01],
    ])
    view = probabilities.log()[None]
    answers = er.predict({"cnn": view}, windows, {"cnn": 1.0}, config())
    assert list(answers) == ["cnn"]
    assert np.allclose(answers["cnn"], [[0.7, 0.3], [0.5, 0.5]])


# %% Another corpus
OWN_REPORT = "outputs/emotion_recognition_report.docx"
FOREIGN = OUTPUT / "evaluation_corpus"


def test_a_manifest_has_its_own_emotions_those_of_ravdess_first_then_by_alphabet():
    path = manifest(
        "b.wav, Zeal ,7,",
        "x\\a.wav,SAD,12,",
        "c.wav,pleased  a lot,7,",
        "d.wav,neutral,7,")
    clips = er.list_manifest(path)
    assert er.classes_of(clips) == ["neutral", "sad", "pleased a lot", "zeal"]
    assert list(clips) == ["clip", "span", "path", "emotion", "actor", "reason"]
    assert list(clips["emotion"]) == ["zeal", "sad", "pleased a lot", "neutral"]
    assert list(clips["clip"]) == ["b.wav", "x/a.wav", "c.wav", "d.wav"]
    assert list(clips["actor"]) == [7, 12, 7, 7]
    assert set(clips["reason"]) == {""}


SPREADSHEETS = {
    "semicolons": "path;emotion;speaker\na.wav;happy;1\nb.wav;sad;2\n",
    "tabs": "path\temotion\tspeaker\na.wav\thappy\t1\nb.wav\tsad\t2\n",
    "a note to Excel": "sep=;\r\npath;emotion;speaker\r\na.wav;happy;1\r\nb.wav;sad;2\r\n",
    "other letters and spaces": 'Path, Emotion ,SPEAKER\na.wav, "happy", 1\nb.wav, sad ,2\n',
    "rows of commas": "path,emotion,speaker,,\na.wav,happy,1,,\nb.wav,sad,2,,\n,,,,\n,,,,,,\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_tables_are_read_as_other_programs_write_them(kind, encoding):
    Path("m.csv").write_bytes(SPREADSHEETS[kind].encode(encoding))
    clips = er.list_manifest("m.csv")
    assert list(clips["clip"]) == ["a.wav", "b.wav"]
    assert list(clips["emotion"]) == ["happy", "sad"]
    assert list(clips["actor"]) == [1, 2]


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "<NA>", "None", "null", " "])
def test_speakers_that_are_missing_throughout_are_nobody(word):
    clips = er.list_manifest(manifest(f"a.wav,happy,{word},", f"b.wav,sad,{word},"))
    assert set(clips["actor"]) == {""}
    assert er.list_manifest(manifest("a.wav,happy,1,", "b.wav,None so,1,"))["emotion"][1] == "none so"


def test_segments_of_one_file_are_clips_of_their_own(unpublished):
    sounds = [speech(), tone(1, RATE), speech()[::-1]]
    written("a.wav", np.concatenate(sounds))
    ends = np.cumsum([0, *map(len, sounds)]) / RATE
    spans = [f"a.wav,{emotion},{start},{end}" for emotion, start, end in
             zip(["happy", "sad", "happy"], ends, ends[1:])]
    manifest(*spans, f"a.wav,sad,{ends[-1] - 0.6},", "a.wav,sad,0,99", header="path,emotion,start,end")
    written("a.wav", np.concatenate(sounds))
    corpus = er.read_corpus(config(manifest="m.csv"))

    first = corpus.clips.set_index("clip").loc[f"a.wav#{ends[0]}-{ends[1]}"]
    assert np.array_equal(first["mel"], er.load_clip(written("b.wav", sounds[0]), config()).mel)
    assert corpus.clips["clip"].is_unique
    assert corpus.clips["digest"].is_unique
    assert len(corpus.clips) == 4  # an open end is that of the file
    reason, = corpus.left_out["reason"]
    assert "from 0.0 to 99.0 s does not lie in its" in reason
    audit = er.describe_split(corpus.clips.assign(split="test"), corpus, config(manifest="m.csv"))
    assert "4 segments of files" in audit


def test_an_emotion_is_the_same_however_its_accents_are_written_and_a_path_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    touch(".", "sound/a.wav")
    lines = ["~/sound/a.wav,Fa\u0302che\u0301,1,", "b.wav,f\u00e2ch\u00e9,1,", "c.wav,sad,1,"]
    clips = er.list_manifest(manifest(*lines))
    assert clips["path"][0] == str(Path("sound/a.wav").absolute())
    assert er.classes_of(clips) == ["sad", "f\u00e2ch\u00e9"]


@pytest.mark.parametrize("name", ["MANIFEST", "OUTPUT_DIR", "INPUT", "RAVDESS_PATH", "WHISPER_MODEL"])
def test_a_tilde_is_the_home_folder_in_flags_and_constants(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert getattr(er.parse_settings([flag(name), "~/it"]), name.lower()) == "/home/ann/it"
    monkeypatch.setattr(er, name, "~/it")
    assert getattr(er.parse_settings([]), name.lower()) == "/home/ann/it"


def test_without_a_home_folder_nothing_breaks(monkeypatch):
    def nowhere():
        """Fail as on a system without home folders."""
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert "does not exist" in refusal_of()
    assert er.whisper_file("base").name == "base.pt"


NOT_EMOTIONS = "start Voiced note model error fold recording predicted system over_time text caveats".split()
NOT_EMOTIONS += ["key", "no speech"]


@pytest.mark.parametrize("name", NOT_EMOTIONS)
def test_no_emotion_is_called_like_a_column_of_an_answer(name):
    path = manifest("a.wav,sad,1,train", f"b.wav,{name},1,train")
    with pytest.raises(er.UserError, match=r"line 3: .* name of a column"):
        er.list_manifest(path)


@pytest.mark.parametrize(("place", "path", "other"), [
    ("sound/a.wav", "sound/a.wav", "sound/a.wav"),  # begins in the working folder
    ("tables/a.wav", r"C:\Users\me\a.wav", "tables/a.wav"),  # begins on another machine
    ("tables/a.wav", "elsewhere/a.wav", "tables/a.wav"),
])
def test_a_manifest_whose_paths_begin_elsewhere_names_both_places(place, path, other):
    touch(".", place, "tables/c.wav")
    lines = "path,emotion", f"{path},sad", "b.wav,happy"
    Path("tables/m.csv").write_text("\n".join(lines), encoding="utf-8")
    tried = f"tables/{path}".replace("\\", "/")
    assert refusal_of("--manifest", "tables/m.csv").startswith(
        f"tables/m.csv line 2: {tried} is not there, but {other} is: ")


def test_a_manifest_that_lacks_one_file_is_heard_although_another_has_its_name(unpublished):
    flags = own_corpus(["happy", "sad"], [1, 2, 3])
    with Path("own/corpus.csv").open("a") as table:
        table.write("elsewhere/000.wav,sad,1\n")
    written("own/000.wav", speech())
    assert "left out: unusable 1" in data_of(*flags)[0]


def test_an_edited_constant_may_stand_on_a_line_of_its_own():
    source = SCRIPT.read_text(encoding="utf-8").replace("\nSETTINGS = ", "\nEPOCHS_CNN = 3\nSETTINGS = ", 1)
    source = source.replace("\nclass UserError", "\nSEED = 7\n\n\nclass UserError", 1)
    Path("edited.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "edited.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "(default: 3)" in done.stdout and "(default: 7)" in done.stdout


def test_paths_of_a_manifest_start_in_its_folder():
    relative, absolute = Path("deep/sound/a.wav"), Path.cwd() / "deep/sound/b.wav"
    lines = f"sound/a.wav,happy\n{absolute},sad"
    written(relative, speech())
    written(absolute, speech())
    Path("deep/m.csv").write_text(f"path,emotion\n{lines}")
    corpus = er.read_corpus(config(manifest="deep/m.csv"))
    assert set(map(Path, corpus.clips["path"])) == {relative, absolute}
    assert corpus.left_out.empty
    assert list(corpus.clips["actor"]) == ["", ""]


def test_lines_without_a_file_that_can_be_heard_are_left_out_and_named(unpublished):
    own_corpus(["happy", "sad"], [1, 2, 3])
    with Path("own/corpus.csv").open("a") as table:
        table.write("/no/e.wav,sad,1\nsound/f.wav,happy,2\n")
    touch("own", "sound/f.wav")
    er.main(["--manifest", "own/corpus.csv", "--phase", "data"])

    left_out = pd.read_csv("outputs/left_out.csv")
    paths = [str(Path(path)) for path in ("/no/e.wav", "own/sound/f.wav")]
    assert sorted(left_out["path"]) == sorted(paths)
    audit = read_json("outputs/audit.json")["audit"]
    assert "8 files in own/corpus.csv: 6 clips of 3 actors are used; left out: unusable 2" in audit[0]
    for path, reason in zip(paths, ("it does not exist", "not readable")):
        assert f"Left out: {path}: {reason}" in "\n".join(audit)


@pytest.mark.parametrize(("first", "second", "expected"), [
    ("2", "10", [2, 10]),
    ("02", "10", ["02", "10"]),
    ("nan", "None", ["", ""]),
    ("1.0", "2", ["1.0", "2"]),
    ("1", "1.0", [1, 1]),
    ("07", "7", ["07", "07"]),
    ("s07", "S7.0", ["s07", "s07"]),
    ("0", "10", [0, 10]),
    ("1.05", "1.5", ["1.05", "1.5"]),
    ("Ren\u00e9", "rene\u0301", ["Ren\u00e9", "Ren\u00e9"]),
])
def test_speakers_are_numbers_only_if_all_are_whole_and_plain(first, second, expected):
    path = manifest(f"a.wav,happy,{first},", f"b.wav,sad,{second},")
    clips = er.list_manifest(path)
    assert clips["actor"].tolist() == expected


def test_a_manifest_is_split_by_speaker():
    speakers = ["ann", "bob", "cy", "dee"]
    own_corpus(["sad", "odd"], speakers)
    cfg = config(manifest="own/corpus.csv")
    corpus = er.read_corpus(cfg)
    assert corpus.split == "speaker"
    assert corpus.caveats == ()
    for fold, speaker in enumerate(speakers):
        run = cfg._replace(folds=str(fold))
        clips = er.split_clips(corpus, run)
        actors = {split: set(part["actor"]) for split, part in clips.groupby("split")}
        assert actors["test"] == {speaker}
        assert sorted(itertools.chain(*actors.values())) == speakers  # none in two splits
        assert len(actors) == 3


def test_of_a_manifest_every_other_sentence_is_heard_in_training_only(unpublished):
    sentences = ["Dogs sit by the door.", "It is eleven o'clock.", "Kids talk.", "So it is."]
    flags = own_corpus(["sad", "odd"], ["ann", "bob", "cy", "dee"], takes=4,
                       transcript=lambda _, __, take: sentences[take])
    audit = data_of(*flags, "--split", "text")
    for half, heard in ((1, sentences[::2]), (2, sentences[1::2])):
        clips = pd.read_csv(f"outputs/fold_0_seed_42_statement_{half}/clips.csv")
        new = {*sentences}.difference(heard)
        assert splits_of(clips)("transcript") == {"train": {*heard}, "validation": new, "test": new}
        assert set(clips["caveats"]) == {"tested on sentences that are not in training"}
    assert "16 clips left out, with a sentence that other splits have" in audit[-1]


def test_a_sentence_in_two_spellings_is_one(unpublished):
    said = ["Dogs sit.", "Kids talk.", "So it is.", "dogs sit", "kids talk", "so it is"]
    flags = own_corpus(["sad", "odd"], [1, 2, 3, 4, 5, 6], takes=3,
                       transcript=lambda _, speaker, take: said[take + 3 * (speaker > 3)])
    data_of(*flags, "--split", "text")
    clips = pd.read_csv("outputs/fold_0_seed_42_statement_1/clips.csv")
    clips["words"] = clips["transcript"].map(er.words_in).map(" ".join)
    words = splits_of(clips)("words")
    assert words["train"].isdisjoint(words["test"])


def test_what_whisper_hears_is_no_sentence_of_the_corpus(monkeypatch, unpublished):
    heard = itertools.cycle(["Dogs sit", "Docks sit"])
    monkeypatch.setattr(er, "transcript_of", lambda *_: next(heard))
    flags = own_corpus(["sad", "odd"], takes=2)
    sentence = refusal_of(*flags, "--no-use-simulated-sentences", "--run-models", "rnn", "--split", "text")
    assert "complete the column transcript" in sentence


def test_no_sound_of_training_is_tested_as_a_segment(unpublished):
    own_corpus(["sad", "odd"])
    splits = "train", "validation", "test", "test"
    lines = ["path,emotion,split,start,end"]
    for number, (emotion, split) in enumerate(itertools.product(["sad", "odd"], splits)):
        lines.append(f"sound/{number:03}.wav,{emotion},{split},,")
    parts = ["sound/000.wav,sad,test,0.1,0.9", "sound/002.wav,sad,test,0.1,0.9"]
    Path("own/two.csv").write_text("\n".join([*lines, *parts]))
    cfg = config(manifest="own/two.csv")
    clips = er.split_clips(er.read_corpus(cfg), cfg)
    assert sorted(clips["clip"]) == sorted([f"sound/{number:03}.wav" for number in range(8)] + [
        "sound/002.wav#0.1-0.9"])


@pytest.mark.parametrize(("parts", "keys"), [
    (["a", "a", "b"], [1, 1, 2]),
    (["a#0.0-2.0", "a#1.0-3.0", "a#3.0-4.0", "b#0.0-2.0", "a#2.5-2.6"], [1, 1, 2, 3, 1]),
    (["b#1e-05-2.0", "b", "a#5.0-inf", "a#4.0-5.0"], [3, 3, 2, 1]),
])
def test_segments_that_overlap_are_the_same_sound(parts, keys):
    assert list(er.shared_sound(pd.Series(parts))) == keys


@pytest.mark.parametrize("seed", range(30))
def test_clips_stay_that_share_no_sound_with_an_earlier_split(seed):
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, 20, 12), rng.integers(1, 5, 12)
    clips = pd.DataFrame({
        "digest": [f"{'ab'[row % 2]}#{start}.0-{start + lengths[row]}.0" for row, start in enumerate(starts)],
        "split": rng.choice(er.SPLITS, 12)})
    kept = []
    for split in er.SPLITS:
        for row in np.flatnonzero(clips["split"] == split):
            shared = [other for other in kept if other % 2 == row % 2 and clips["split"][other] != split
                      and starts[other] < starts[row] + lengths[row]
                      and starts[row] < starts[other] + lengths[other]]
            kept += [row] * (not shared)
    expected = clips.loc[sorted(kept)].reset_index(drop=True)
    pd.testing.assert_frame_equal(er.unheard(clips), expected)


def test_a_split_without_usable_clips_is_named(unpublished):
    flags = own_corpus(["sad", "odd"], split=lambda _, speaker, __: (*er.SPLITS, "train")[speaker - 1])
    for place in (1, 5):
        Path(f"own/sound/{place:03}.wav").write_text("no sound")
    assert "no clip of the split validation of own/corpus.csv is left" in refusal_of(*flags)


def test_clips_of_two_voices_in_two_channels_are_said(unpublished):
    flags = own_corpus(["sad", "odd"])
    for path in Path("own/sound").glob("*.wav"):
        samples, rate = soundfile.read(path)
        written(path, np.stack([samples, np.roll(samples[::-1], 99)], axis=1), rate)
    audit = data_of(*flags)
    assert "Notes on their sound: 2 different channels were mixed: --channel 1 picks one 8." in audit


@pytest.mark.parametrize(("said", "named"), [
    (lambda speaker, take: f"{speaker} says {take}.", "'ann says 0' has one speaker"),
    (lambda speaker, take: "It is so." * take, "'sound/000.wav' has one speaker"),  # half of them say nothing
    (None, "has one speaker"),
])
def test_a_manifest_without_repeated_sentences_has_no_split_by_text(said, named, unpublished):
    columns = {"transcript": lambda _, speaker, take: said(speaker, take)} if said else {}
    flags = own_corpus(["sad", "odd"], ["ann", "bob", "cy", "dee"], takes=2, **columns)
    sentence = refusal_of(*flags, "--split", "text")
    assert named in sentence
    assert "transcript of own/corpus.csv" in sentence


@pytest.mark.parametrize(("tested", "caveats", "end"), [
    (2, [], "."),
    (1, ["split of the manifest: speakers shared between splits or unknown"],
     "; 1 actor in several splits."),
])
def test_a_split_of_the_manifest_is_kept_and_shared_speakers_are_counted(tested, caveats, end, monkeypatch):
    titles = []
    monkeypatch.setattr(er, "save_figure", lambda *what, **_: titles.append(what[3]))
    speakers = {"train": 1, "Test": tested, "validation": 3}
    command = own_corpus(
        ["sad", "odd"],
        list(speakers),
        speaker=lambda _, split, __: speakers[split],
        split=lambda _, split, __: split)
    er.main([*command, "--phase", "data"])
    clips = pd.read_csv("outputs/clips.csv")
    assert list(clips["split"]) == ["train", "test", "validation"] * 2
    assert titles == [
        "corpus.csv, split of the manifest, 6 clips", "corpus.csv, split of the manifest, training clips"]

    audit = read_json("outputs/audit.json")
    sentence, = (text for text in audit["audit"] if "Split of the manifest" in text)
    assert sentence.startswith("Split of the manifest: train 2 clips of actors 1; ")
    assert sentence.endswith(f"test 2 clips of actors {tested}{end}")
    assert audit["caveats"] == caveats


@pytest.mark.parametrize("written_as", ["train", "training"])
def test_a_split_without_validation_takes_speakers_of_training_and_says_so(written_as, unpublished):
    flags = own_corpus(
        ["sad", "odd"], ["ann", "bob", "cy", "dee"],
        split=lambda _, speaker, __: "test" if speaker == "dee" else written_as)
    audit = data_of(*flags)
    clips = pd.read_csv("outputs/clips.csv")
    assert clips.groupby("split")["actor"].unique().map(sorted).to_dict() == {
        "train": ["ann", "cy"], "validation": ["bob"], "test": ["dee"]}
    assert set(clips["caveats"]) == {"validation: every fifth speaker of the manifest's training split"}
    assert "validation 2 clips of actors bob" in audit[-1]


def test_a_split_without_validation_needs_speakers_to_take(unpublished):
    flags = own_corpus(["sad", "odd"], [1, 2], speaker=lambda *_: "",
                       split=lambda _, speaker, __: ["train", "test"][speaker - 1])
    assert refusal_of(*flags).startswith(
        "own/corpus.csv has no split validation, and too few named speakers in train to choose some: ")


def test_without_speakers_the_split_is_random_and_everything_says_so(unpublished):
    command = own_corpus(
        ["sad", "happy"],
        takes=3,
        speaker=lambda *_: "",
        transcript=lambda *_: "So it is.")
    er.main([*command, "--phase", "unimodal", "--run-models", "rnn"])
    results = er.read_results("outputs")
    audit = str(results.config["audit"])
    assert results.config["caveats"] == ["random split: speakers shared between splits"]
    assert "No speakers are named" in audit
    assert "of actors" not in audit

    assert set(results.predictions["split"]) == set(er.SPLITS)
    assert set(results.predictions["system"]) == {"rnn"}
    assert set(results.predictions["actor"]) == {""}
    draws = er.bootstrap(results)["rnn"]
    assert draws.nunique() > 2  # single clips are drawn


def test_names_that_look_like_something_else_survive_the_whole_pipeline(trained, request):
    emotions = ["inf", "yes", "$x_y", "<b>&", "1", "happy"]
    speakers = ["001", "N", "False", "$s_1$"]
    command = own_corpus(emotions, speakers, transcript=lambda emotion, *_: f"<i>& $a_ {emotion}\x07\u4f60")
    command += ["--run-models", "cnn,rnn,fusion_rnn", "--test-views", "2"]
    er.main(command)
    results = er.read_results("outputs")
    names = ["cnn", "rnn", "fusion_rnn", "late_rnn", "learned_rnn"]
    assert list(figures("outputs")) == names
    assert results.config["classes"] == ["happy", "$x_y", "1", "<b>&", "inf", "yes"]
    assert results.config["caveats"] == []
    assert "oracle" not in str(results.config["titles"])

    for name in names:
        table = said_by(name, results.predictions)
        assert set(table["actor"]) == set(speakers)
        assert set(table["emotion"]) == set(emotions)
        assert set(table["predicted"]) <= set(emotions)

    text = text_of(OWN_REPORT)
    for words in ("corpus.csv, fold 0, 6 test clips, 1 speaker.", "<b>&", "$x_y", "001 6", "own/corpus.csv"):
        assert words in text, words
    for words in ("RAVDESS,", "oracle", "intensity", "Simulated sentences", "North American"):
        assert words not in text, words
    import docx
    tables = docx.Document(OWN_REPORT).tables
    assert min(len(table.rows) for table in tables) > 1

    request.getfixturevalue("unpublished")
    er.main(command)
    assert trained == ["cnn", "rnn", "fusion_rnn"]


def test_an_emotion_without_sentences_leaves_sound_alone(unpublished):
    er.main([*own_corpus(["happy", "contempt"]), "--phase", "unimodal"])
    results = er.read_results("outputs")
    assert set(results.predictions["system"]) == {"cnn"}
    assert results.config["caveats"] == []
    for name in ("rnn", "bert", "fusion_rnn", "late_rnn", "learned_bert"):
        reason = results.config["not_run"][name]
        assert "no sentences for contempt: add a column transcript to own/corpus.csv" in reason


def test_own_sentences_serve_the_emotions_of_a_manifest_and_are_an_oracle(unpublished):
    emotions = ["happy", "contempt"]
    write_sentences("s.csv", "contempt,Of course.", emotions=emotions)
    er.main([*own_corpus(emotions), "--phase", "data", "--sentences-csv", "s.csv"])
    clips = pd.read_csv("outputs/clips.csv")
    for clip in clips.itertuples():
        sentences = ["Of course.", *(f"Sentence contempt {number}" for number in range(5))]
        if clip.emotion == "happy":
            sentences = [f"Sentence happy {number}" for number in range(5)]
        assert clip.transcript in sentences
    assert read_json("outputs/audit.json")["caveats"] == ["text: simulated sentences (oracle)"]


MANIFESTS = SCRIPT.parent / "archive/corpora.py"
NAME_EXAMPLES = {
    "crema-d": "1001_DFA_ANG_XX.wav",
    "tess": "OAF_back_angry.wav",
    "savee": "DC_a01.wav or DC/a01.wav",
    "emo-db": "03a01Wa.wav",
}
KNOWN_CORPORA = {  # by corpus: file names in the order of the table, each with the rest of its row
    "crema-d": {
        "1091_IEO_SAD_HI.wav": "sad,1091,It's eleven o'clock",
        "1091_TIE_SAD_X.wav": "sad,1091,That is exactly what happened",
        "AudioWAV/1001_DFA_ANG_XX.wav": "angry,1001,Don't forget a jacket",
        "AudioWAV/1001_IOM_DIS_XX.wav": "disgust,1001,I'm on my way to the meeting",
        "AudioWAV/1001_ITH_FEA_XX.wav": "fearful,1001,I think I have a doctor's appointment",
        "AudioWAV/1001_ITS_HAP_XX.wav": "happy,1001,I think I've seen this before",
        "AudioWAV/1001_IWL_NEU_XX.WAV": "neutral,1001,I would like a new alarm clock",
        "AudioWAV/1001_IWW_NEU_XX.wav": "neutral,1001,I wonder what this is about",
        "AudioWAV/1001_MTI_NEU_XX.wav": "neutral,1001,Maybe tomorrow it will be cold",
        "AudioWAV/1001_TAI_NEU_XX.wav": "neutral,1001,The airplane is almost full",
        "AudioWAV/1001_TSI_NEU_XX.wav": "neutral,1001,The surface is slick",
        "AudioWAV/1001_WSI_NEU_XX.wav": "neutral,1001,We'll stop in a couple of minutes",
    },
    "tess": {
        "OAF_dog_fear.wav": "fearful,OAF,Say the word dog.",
        "OAF_Sad/OAF_back_Sad.wav": "sad,OAF,Say the word back.",
        "OAF_neutral/OAF_bite_happy.wav": "happy,OAF,Say the word bite.",
        "OAF_neutral/OA_bite_neutral.wav": "neutral,OAF,Say the word bite.",
        "YAF_ps/YAF_young_angry.wav": "angry,YAF,Say the word young.",
        "YAF_ps/YAF_young_disgust.wav": "disgust,YAF,Say the word young.",
        "YAF_ps/YAF_young_ps.wav": "surprised,YAF,Say the word young.",
    },
    "savee": {
        "DC_a01.wav": "angry,DC",
        "DC_d01.wav": "disgust,DC",
        "AudioData/JE/a01.wav": "angry,JE",
        "AudioData/JE/f01.wav": "fearful,JE",
        "AudioData/JK/h15.wav": "happy,JK",
        "AudioData/JK/n30.wav": "neutral,JK",
        "KL/KL_su01.wav": "surprised,KL",
        "KL/sa01.wav": "sad,KL",
    },
    "emo-db": {
        "08a02Fe.wav": "happy,08",
        "wav/03a01Ab.wav": "fearful,03",
        "wav/03a01Wa.wav": "angry,03",
        "wav/03b01Ea.wav": "disgust,03",
        "wav/03b01Ta.wav": "sad,03",
        "wav/16b10Lb.wav": "bored,16",
        "wav/16b10Nb.wav": "neutral,16",
    },
}
NO_CLIPS = {  # by corpus: files that come after those of KNOWN_CORPORA and are no further clips
    "crema-d": ["Video/1001_DFA_ANG_XX.mp3", "Video/1001_DFA_SHY_XX.wav", "again/1001_DFA_ANG_XX.wav"],
    "tess": ["old/readme.wav", "old/OAF_dog_love.wav", "tess/OAF_Sad/OAF_back_sad.wav"],
    "savee": ["KL/sad01.mp3", "old/XY_a01.wav", "old/DC_a01.wav"],
    "emo-db": ["wav/16b10Xb.wav", "wav/x16b10Na.wav", "wav2/08a02Fe.wav"],
}


@pytest.fixture(scope="session")
def corpora():
    return companion(MANIFESTS)


@pytest.mark.parametrize("name", KNOWN_CORPORA)
def test_the_file_names_of_a_known_corpus_make_a_manifest(name, corpora, capsys):
    rows = KNOWN_CORPORA[name]
    touch("sound", *rows, *NO_CLIPS[name])
    corpora.main([name, "sound"])
    table, said = capsys.readouterr()

    columns = "path,emotion,speaker"
    if name in ("crema-d", "tess"):
        columns += ",transcript"
    folder = Path.cwd() / "sound"
    expected = [f"{folder.as_posix()}/{path},{rest}" for path, rest in rows.items()]
    assert table == "\n".join([columns, *expected, ""])

    count, others = said.splitlines()
    assert count == f"{len(rows)} clips; second copies passed over: 1"
    assert others.startswith(f"passed over: 2 files with other names, such as {folder}")

    # Wherever the table lies, it is read.
    touch("tables", "m.csv")
    Path("tables/m.csv").write_text(table, encoding="utf-8")
    clips = er.list_manifest("tables/m.csv")
    for clip, (path, rest) in zip(clips.itertuples(), rows.items(), strict=True):
        assert Path(clip.path).samefile(folder / path)
        assert rest.startswith(f"{clip.emotion},{clip.actor}")


def test_a_manifest_of_a_known_corpus_is_utf_8_and_its_clips_are_heard():
    for emotion in ("ANG", "SAD"):
        written(f"Töne, laut/1001_DFA_{emotion}_XX.wav", speech())
    command = [sys.executable, str(MANIFESTS), "crema-d", "Töne, laut"]
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii"}
    Path("tables").mkdir()
    with Path("tables/m.csv").open("wb") as table:
        subprocess.run(command, stdout=table, env=surroundings, check=True, timeout=120)

    corpus = er.read_corpus(config(manifest="tables/m.csv"))
    assert corpus.left_out.empty
    assert list(corpus.clips["emotion"]) == ["angry", "sad"]
    assert list(corpus.clips["actor"]) == [1001, 1001]
    assert set(corpus.clips["transcript"]) == {"Don't forget a jacket"}
    assert corpus.words == "manifest"


def table_refusal(corpora, capsys, *argv):
    """What the table's script says when it refuses a command: on stderr, with exit code 2 and no table."""
    with pytest.raises(SystemExit) as stop:
        corpora.main(argv)
    table, said = capsys.readouterr()
    assert stop.value.code == 2
    assert table == ""
    return said


@pytest.mark.parametrize("name", KNOWN_CORPORA)
@pytest.mark.parametrize(("folder", "problem"), [
    ("missing", "is no folder"),
    ("sound/readme.wav", "is no folder"),
    ("sound", "holds no clips of {}"),
    ("empty", "holds no clips of {}"),
])
def test_a_folder_without_the_known_corpus_is_named_with_the_names_it_should_have(
        folder, problem, name, corpora, capsys):
    touch("sound", "readme.wav", "03-01-05-01-02-01-12.wav")
    Path("empty").mkdir()
    problem = problem.format(name.upper())
    advice = f"name a folder with files like {NAME_EXAMPLES[name]}"
    said = table_refusal(corpora, capsys, name, folder)
    assert said == f"error: {Path.cwd() / folder} {problem}: {advice}\n"


def test_a_corpus_that_is_not_known_is_answered_with_those_that_are(corpora, capsys):
    said = table_refusal(corpora, capsys, "emodb", ".")
    assert "invalid choice: 'emodb'" in said
    for name in KNOWN_CORPORA:
        assert name in said


def test_a_path_that_no_utf_8_table_can_hold_is_an_error(corpora, capfd):
    folder = Path(os.fsdecode(b"T\xf6ne"))
    try:
        touch(folder, "DC_a01.wav")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    said = table_refusal(corpora, capfd, "savee", str(folder))
    assert re.fullmatch("error: .* is not UTF-8, as the table must be: rename it\n", said)


def evaluate(*flags):
    """Score the models of outputs/demo on own/corpus.csv; the Results."""
    er.main(["--manifest", "own/corpus.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate", *flags])
    return er.read_results(FOREIGN)


@pytest.fixture(scope="session")
def scored(finished, tmp_path_factory):
    """A folder in which the demo's models were scored on another corpus, of which they know happy and sad."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(finished, folder, dirs_exist_ok=True, copy_function=copy_or_link)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_corpus(["sad", "odd", "happy"], [7, 8], transcript=lambda emotion, *_: f"It is {emotion}.")
        evaluate(*TINY)
    return folder


def test_emotions_that_are_merged_are_one_and_every_page_says_so(few_clips, unpublished):
    unpacked(few_clips)
    audit = data_of("--ravdess-path", "corpus", "--merge", "calm=Neutral, disgust = angry")
    assert "Clips per emotion: neutral 6, happy 3, sad 3, angry 6, fearful 3, surprised 3." in audit
    assert "merged: calm=Neutral,disgust = angry" in read_json("outputs/audit.json")["caveats"]
    clips = pd.read_csv("outputs/clips.csv")
    assert set(clips.loc[clips["clip"].str.contains("03-01-02-"), "emotion"]) == {"neutral"}


@pytest.mark.parametrize("wrong", [
    "clam=sad", "calm=nothing", "calm=happiness", "fear=calm", "calm", "calm=", "=calm", "calm=sad=happy"])
def test_a_merge_of_unknown_names_lists_what_there_is(few_clips, wrong):
    unpacked(few_clips)
    sentence = refusal_of("--ravdess-path", "corpus", "--merge", wrong)
    assert sentence.startswith(f"--merge {wrong} is not a list of pairs such as calm=neutral")
    assert sentence.endswith(f"of {', '.join(er.EMOTIONS)}")


@pytest.mark.parametrize("wrong", ["calm=neutral,neutral=sad", "calm=neutral,calm=sad", "calm=calm"])
def test_a_merge_counts_no_emotion_twice(few_clips, wrong):
    unpacked(few_clips)
    sentence = refusal_of("--ravdess-path", "corpus", "--merge", wrong)
    assert sentence.startswith(f"--merge {wrong} counts an emotion as two, or as one that is itself merged")


@pytest.mark.parametrize(("merge", "classes"), [
    ("joy=happy", ["happy", "angry"]),
    ("anger=sad,happiness=happy", ["happy", "sad"]),
    ("joy=sad,anger=sad", ["sad"]),
])
def test_a_merge_may_say_in_other_words_what_models_call_an_emotion(merge, classes):
    files = pd.DataFrame({"emotion": pd.Categorical(["joy", "anger"])})
    names = er.merged(files, config(merge=merge), er.EMOTIONS)["emotion"]
    assert [name for name in er.EMOTIONS if name in set(names)] == classes


def test_a_merge_in_other_words_counts_no_emotion_twice():
    files = pd.DataFrame({"emotion": pd.Categorical(["joy", "anger"])})
    with pytest.raises(er.UserError, match="counts an emotion as two"):
        er.merged(files, config(merge="anger=sad,angry=happy"), er.EMOTIONS)


def test_clips_of_merged_emotions_are_missed(few_clips, unpublished):
    unpacked({name: data for name, data in few_clips.items() if name != "Actor_01/03-01-02-01-01-01-01.wav"})
    audit = data_of("--ravdess-path", "corpus", "--merge", "calm=neutral")
    assert "Missing from the 1440 clips of RAVDESS: 1417, the first 03-01-01-01-01-01-04." in audit


def test_an_evaluation_merges_by_either_name_and_compares_emotions_that_have_clips(copied, unpublished):
    own_corpus(["happiness", "sad", "angry"], [7, 8])
    assert evaluate("--merge", "happy=sad").config["classes"] == ["sad", "angry"]
    shutil.rmtree(FOREIGN)
    for name in ("002.wav", "003.wav"):  # all that are sad
        Path("own/sound", name).write_text("no sound")
    assert evaluate().config["classes"] == ["happy", "angry"]


def test_an_answer_counts_as_the_emotion_that_it_is_merged_with(copied, unpublished):
    own_corpus(["neutral", "calm", "anger"], [7, 8])
    plain = evaluate().predictions
    merged = evaluate("--merge", "calm=neutral").predictions
    assert np.allclose(merged["neutral"], plain["neutral"] + plain["calm"], atol=1e-5)
    assert np.allclose(merged["angry"], plain["angry"], atol=1e-5)
    assert (merged["predicted"] == merged[["neutral", "angry"]].idxmax(axis=1)).all()


def test_segments_of_files_that_were_trained_on_are_known(copied, unpublished):
    lines = ["path,emotion,start,end"]
    for path in CORPUS.glob("Actor_03/*.wav"):
        emotion, seconds = er.EMOTIONS[int(path.name[6:8]) - 1], soundfile.info(path).duration
        lines.append(f"{path.absolute()},{emotion},0,{seconds}")
    Path("own").mkdir()
    Path("own/corpus.csv").write_text("\n".join(lines))
    assert "16 of these 16 clips are known from training: the figures flatter" in evaluate().config["caveats"]


def test_other_words_for_the_emotions_of_the_models_count_as_them(copied, unpublished):
    own_corpus(["happiness", "anger", "boredom", "odd"], [7])
    results = evaluate("--merge", "boredom=sad")
    assert results.config["classes"] == ["happy", "sad", "angry"]
    assert results.config["subject"] == "corpus.csv, all its clips, 3 test clips, 1 speaker"
    assert "merged: boredom=sad" in results.config["caveats"]
    audit = " ".join(results.config["audit"])
    assert "Clips per emotion: happy 1, sad 1, angry 1, odd 1." in audit
    assert "also called anger" in audit
    assert "unknown to the models: odd 1. (--merge" in audit


@pytest.fixture
def evaluated(scored, monkeypatch):
    """The Results of the demo's models on another corpus; they lie in the current folder, to be read only."""
    monkeypatch.chdir(scored)
    return er.read_results(FOREIGN)


def test_the_command_of_an_evaluation_repeats_it(evaluated):
    _, _, *flags = shlex.split(evaluated.config["command"])
    again = er.parse_settings(flags)
    assert again.phase == "evaluate"
    assert Path(again.output_dir) == OUTPUT
    assert again.manifest == evaluated.config["settings"]["manifest"]


def test_an_evaluation_writes_into_its_own_folder_and_the_cache_alone(scored, finished, monkeypatch):
    monkeypatch.chdir(finished)
    before, there = contents(OUTPUT), set(OUTPUT.rglob("*"))
    monkeypatch.chdir(scored)
    after, new = contents(OUTPUT), set(OUTPUT.rglob("*")) - there
    for path in before:
        assert after[path] == before[path]
    assert {path.parent for path in new if FOREIGN not in (path, *path.parents)} == {OUTPUT / "cache"}


def test_trained_models_are_scored_on_the_emotions_that_another_corpus_shares(evaluated):
    config, scores = evaluated.config, figures(FOREIGN)
    assert config["classes"] == ["happy", "sad"]
    assert list(scores) == SCORED
    assert config["not_run"] == {}
    assert "oracle" not in str(config["titles"])
    assert "6 files in own/corpus.csv: 6 clips of 2 actors are used" in config["audit"][0]
    assert "Clips left out, unknown to the models: odd 2." in config["audit"][-2]
    assert config["caveats"] == [
        "models of outputs/demo on another corpus",
        "in training: synthetic demo corpus: the figures mean nothing",
        "in training: text: simulated sentences (oracle)",
    ]

    summary = er.summarize(evaluated)
    for name in SCORED:
        table = said_by(name, evaluated.predictions)
        assert len(table) == 4
        assert table["clip"].is_unique
        assert set(table["emotion"]) == {"happy", "sad"}
        assert np.allclose(table["happy"] + table["sad"], 1, atol=2e-6)
        assert set(table["caveats"]) == {"; ".join(config["caveats"])}
        right = (table["emotion"] == table["predicted"]).mean()
        assert scores[name]["uar"] == pytest.approx(right)
        assert summary["low"][name] <= right <= summary["high"][name]


def test_the_report_of_an_evaluation_says_what_its_figures_are(evaluated):
    text = text_of(FOREIGN / "emotion_recognition_report.docx")
    adapted = "adapted takes something of these clips, mean and deviation"
    for words in (adapted, "models of outputs/demo on another corpus"):
        assert words in text, words
    assert "RAVDESS" not in text
    plots = {path.stem for path in FOREIGN.glob("plots/*.png")}
    confusions = {f"confusion_{er.SYSTEMS[name].file}" for name in SCORED}
    assert plots == {"comparison", "coverage"} | confusions  # no bin of confidence has five clips


def test_a_foreign_answer_is_that_of_the_checkpoint_renormalised(evaluated):
    cfg = er.parse_settings(DEMO)._replace(manifest="own/corpus.csv")
    corpus = er.read_corpus(cfg)
    clips = corpus.clips.query("emotion != 'odd'")
    calibration, = read_json(OUTPUT / "config.json")["calibration"].values()
    expected = {}
    for name in ("cnn", "rnn", "fusion_rnn"):
        checkpoint = er.read_checkpoint(cfg, name)
        model = er.restore(checkpoint)
        log_probs = er.infer(model, clips, cfg, "cpu")
        logits = log_probs.mean(dim=0) / calibration[name]
        expected[name] = logits.softmax(dim=1)

    sound, words = expected["cnn"], expected["rnn"]
    weight_of_sound, weight_of_words = calibration["learned_rnn"]
    expected["late_rnn"] = (sound + words) / 2
    expected["learned_rnn"] = sound**weight_of_sound * words**weight_of_words
    for name, values in expected.items():
        happy = values[:, er.EMOTIONS.index("happy")]
        sad = values[:, er.EMOTIONS.index("sad")]
        shares = happy / (happy + sad)
        table = said_by(name, evaluated.predictions)
        assert list(table["clip"]) == list(clips["clip"])
        assert np.allclose(table["happy"], shares, atol=1e-5), name


def test_a_foreign_corpus_without_words_is_only_heard_as_in_training(copied, unpublished, monkeypatch):
    own_corpus(["happy", "sad"], speaker=lambda *_: "")
    monkeypatch.setattr(er, "N_MELS", 32)
    results = evaluate()
    config = results.config
    assert set(results.predictions["system"]) == {*WORDLESS, "speech_adapted"}
    assert config["settings"]["n_mels"] == 64
    reading = set(SHOWN) - set(WORDLESS)
    assert config["not_run"] == dict.fromkeys(reading, "own/corpus.csv has no column transcript")
    assert "intervals draw single clips" in str(config["audit"])


def test_an_evaluation_anew_shows_nothing_of_the_one_before(copied, monkeypatch):
    def draw_a_dot(figure, path, *_, **__):
        """Save a picture in no time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        er.plt.imsave(path, np.zeros((1, 1)))
        er.plt.close(figure)
    monkeypatch.setattr(er, "save_figure", draw_a_dot)
    own_corpus(["happy", "sad"], [7], transcript=lambda *_: "So it is.")
    evaluate()
    table = pd.read_csv("own/corpus.csv")
    table.drop(columns="transcript").to_csv("own/corpus.csv", index=False)
    evaluate()

    import docx
    document = docx.Document(FOREIGN / "emotion_recognition_report.docx")
    heard = {f"confusion_{er.SYSTEMS[name].file}" for name in (*WORDLESS, "speech_adapted")}
    plots = {path.stem for path in FOREIGN.glob("plots/*.png")}
    assert plots == {"comparison", "coverage", *heard}
    assert len(document.inline_shapes) == len(plots)


def test_clips_that_an_evaluation_leaves_out_are_listed(copied, unpublished):
    own_corpus(["happy", "sad"])
    touch("own", "sound/000.wav")
    results = evaluate()
    assert "7 clips of 4 actors are used; left out: unusable 1 (left_out.csv)" in results.config["audit"][0]
    left_out = pd.read_csv(FOREIGN / "left_out.csv")
    assert list(left_out["path"]) == [str(Path("own/sound/000.wav"))]


def test_models_of_a_manifest_are_scored_on_another_that_has_its_own_split(learned, unpublished):
    shutil.copytree(learned / "outputs", OUTPUT)
    own_corpus(["calm", "angry"], [1], split=lambda *_: "train")
    results = evaluate()
    assert len(results.predictions) == 2
    assert set(results.predictions["split"]) == {"test"}


def test_clips_that_the_models_know_from_training_are_counted(copied, unpublished):
    source = OUTPUT / "clips.csv"
    clips = pd.read_csv(source)
    source.unlink()  # checkpoints are enough
    clips["path"] = [Path(path).absolute() for path in clips["path"]]
    clips[["path", "emotion"]].to_csv("all.csv", index=False)
    er.main(["--manifest", "all.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate"])
    known = sum(clips["split"] != "test")
    caveats = read_json(OUTPUT / "evaluation_all/config.json")["caveats"]
    assert f"{known} of these {len(clips)} clips are known from training: the figures flatter" in caveats


def test_tables_of_the_same_name_do_not_overwrite_each_others_figures(copied, unpublished):
    own_corpus(["happy", "sad"], [7])
    evaluate()
    shutil.copytree("own", "other")
    command = ["--manifest", "other/corpus.csv", "--output-dir", str(OUTPUT), "--phase", "evaluate"]
    before = contents(OUTPUT)
    with pytest.raises(er.UserError, match=r"evaluation_corpus holds the figures of own/corpus.csv: move"):
        er.main(command)
    assert contents(OUTPUT) == before

    er.save(FOREIGN / "config.json", [1])  # not ours: nothing is known of its figures
    er.main(command)
    assert er.read_results(FOREIGN).config["settings"]["manifest"] == "other/corpus.csv"


def test_a_corpus_with_too_few_emotions_in_common_is_not_evaluated(copied):
    own_corpus(["happy", "odd"], [7])
    with pytest.raises(er.UserError, match=r"has happy in common with .*, fewer than two of neutral, calm"):
        evaluate()
    assert not FOREIGN.exists()


# %% Resuming
@pytest.fixture
def rnn_command(finished):
    """A command line that trains TextRNN alone on the clips of the demo, into outputs/."""
    corpus = str(finished / CORPUS)
    return ["--ravdess-path", corpus, "--phase", "unimodal", "--run-models", "rnn", *TINY]


@pytest.fixture(scope="session")
def processes():
    """PROCESSES, whose server starts where it finds the script and these tests, to import them once."""
    PROCESSES.set_forkserver_preload(["emotion_recognition", "test_emotion_recognition", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SCRIPT.parent)
        first = PROCESSES.Process(target=er.names_in, args=("",))
        first.start()
        first.join()  # so that no test measures how long the imports take
    return PROCESSES


def unfinished(demo, folder, epochs=3):
    """The settings of the demo with more epochs, and a folder that holds the checkpoints of the demo."""
    Path(folder).mkdir()
    for path in Path(demo[0].output_dir).glob("*.pth"):
        shutil.copy(path, folder)
    more = {f"epochs_{suffix}": epochs for suffix in ("cnn", "rnn", "bert", "fusion")}
    return demo[0]._replace(output_dir=str(folder), **more)


def in_epoch(patch, epoch):
    """Interrupt the training from here on in this epoch, once its steps are done."""
    interrupt(patch, er, "logits_of", epoch)


def state_of(folder, name):
    """The path of what an unfinished training left."""
    return er.file_of(config(output_dir=str(folder)), name, "_training.pth")


def assert_same_training(name, first, second):
    """Two folders hold the same weights, log-probabilities and history of a model."""
    one = er.read_checkpoint(config(output_dir=str(first)), name)
    two = er.read_checkpoint(config(output_dir=str(second)), name)
    assert list(one.weights) == list(two.weights)
    for key, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[key]), key
    assert torch.equal(one.log_probs, two.log_probs)
    assert one.windows == two.windows
    assert one.fingerprint == two.fingerprint

    histories = [pd.DataFrame(checkpoint.history) for checkpoint in (one, two)]
    for history in histories:
        del history["seconds"]
    pd.testing.assert_frame_equal(*histories)


@pytest.mark.parametrize("name", ["cnn", "rnn", "bert", "fusion_rnn"])
def test_an_interrupted_training_goes_on_to_the_same_weights(name, demo, corpus, monkeypatch, capsys):
    whole, parts = unfinished(demo, "whole"), unfinished(demo, "parts")
    er.train_system(whole, name, demo[1], corpus, "cpu")
    before, state = contents("parts"), state_of("parts", name)
    for epoch, done in ((3, 2), (1, 2)):  # in the third epoch, and there again at once
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            in_epoch(patch, epoch)
            er.train_system(parts, name, demo[1], corpus, "cpu")
        assert len(torch.load(state, weights_only=True)["history"]) == done
        after = contents("parts")
        assert after.keys() - before.keys() == {str(state)}
        assert before.items() <= after.items()

    torch.rand(3)  # whatever was drawn before must not matter
    er.train_system(parts, name, demo[1], corpus, "cpu")
    assert capsys.readouterr().out.count("goes on after epoch 2 of 3") == 2
    assert_same_training(name, "whole", "parts")
    assert len(er.read_checkpoint(parts, name).history) == 3
    assert not state.exists()


def test_the_state_of_a_longer_training_outlives_a_run_that_reuses_the_shorter_one(
        rnn_command, monkeypatch, unpublished):
    er.main(rnn_command)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_epoch(patch, 2)
        er.main([*rnn_command, "--epochs-rnn", "3"])
    er.main(rnn_command)
    assert state_of("outputs", "rnn").exists()


def test_the_frozen_parts_of_a_fusion_are_not_in_its_state(demo, corpus, monkeypatch):
    cfg = unfinished(demo, "parts")
    with pytest.raises(KeyboardInterrupt):
        in_epoch(monkeypatch, 2)
        er.train_system(cfg, "fusion_rnn", demo[1], corpus, "cpu")
    state, checkpoint = state_of("parts", "fusion_rnn"), er.file_of(cfg, "fusion_rnn")
    assert state.stat().st_size < checkpoint.stat().st_size / 2


WRITES = ["state of epoch 1", "state of epoch 2", "old checkpoint aside", "checkpoint"]


def test_a_training_may_stop_between_any_two_writes(demo, corpus, monkeypatch):
    cfg = unfinished(demo, "whole", 2)
    old = er.file_of(cfg, "rnn").read_bytes()
    er.train_system(cfg, "rnn", demo[1], corpus, "cpu")
    for number, what in enumerate(WRITES, 1):
        cfg = unfinished(demo, f"write {number}", 2)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, Path, "replace", number, after=True)
            er.train_system(cfg, "rnn", demo[1], corpus, "cpu")
        assert state_of(cfg.output_dir, "rnn").exists()

        stale = er.stale_because(cfg, "rnn", demo[1])
        assert bool(stale) == (what != "checkpoint")
        if stale:
            er.train_system(cfg, "rnn", demo[1], corpus, "cpu")
            assert not state_of(cfg.output_dir, "rnn").exists()
        assert_same_training("rnn", "whole", cfg.output_dir)
        assert Path(cfg.output_dir, "TextRNN_best.previous.pth").read_bytes() == old


def test_the_state_of_a_finished_training_is_deleted_by_the_next_run(
        rnn_command, demo, corpus, monkeypatch, unpublished, trained):
    cfg = er.parse_settings(rnn_command)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, Path, "replace", 2, after=True)  # the state of one epoch, and the checkpoint
        er.train_system(cfg, "rnn", demo[1], corpus, "cpu")
    assert state_of("outputs", "rnn").exists()
    er.main(rnn_command)
    assert trained == ["rnn"]
    assert not state_of("outputs", "rnn").exists()


def without(path, *keys):
    """Take the last entry out of what a file of torch holds under these keys."""
    content = torch.load(path, weights_only=True)
    inner = content
    for key in keys:
        inner = inner[key]
    inner.popitem()
    torch.save(content, path)


def with_fingerprint(path, key, value):
    """Let the training that a file of torch holds depend on something else."""
    content = torch.load(path, weights_only=True)
    content["fingerprint"][key] = value
    torch.save(content, path)


USELESS = {  # what is wrong with a state: (how it is made so, what is printed)
    "other settings": (
        lambda path: with_fingerprint(path, "learning_rate_rnn", "0.001"),
        "learning_rate_rnn 0.001 -> 0.002"),
    "other clips": (lambda path: with_fingerprint(path, "clips", "others"), "clips changed"),
    "other words": (lambda path: with_fingerprint(path, "transcripts", "others"), "transcripts changed"),
    "other code": (lambda path: with_fingerprint(path, "code", "older"), "code changed"),
    "other device": (lambda path: without(path, "fingerprint"), "device None -> cpu "),
    "cut": (lambda path: cut(path, path.stat().st_size - 1000), "not usable"),
    "empty": (lambda path: cut(path, 0), "not usable"),
    "foreign": (lambda path: torch.save([1], path), "not usable"),
    "hostile": (lambda path: torch.save(Hostile(), path), "not usable"),
    "hostile pickle": (lambda path: path.write_bytes(pickle.dumps(Hostile())), "not usable"),
    "a weight less": (lambda path: without(path, "trainer", "average"), "not usable"),
    "no schedule": (lambda path: without(path, "trainer", "optimizer"), "not usable"),
}


@pytest.fixture(scope="session")
def halfway(demo, corpus, tmp_path_factory):
    """Two folders: TextRNN trained for two epochs, and the same stopped after the first one."""
    folder = tmp_path_factory.mktemp("halfway")
    whole = unfinished(demo, folder / "whole", 2)
    er.train_system(whole, "rnn", demo[1], corpus, "cpu")
    parts = unfinished(demo, folder / "parts", 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_epoch(patch, 2)
        er.train_system(parts, "rnn", demo[1], corpus, "cpu")
    return folder


@pytest.mark.parametrize("case", USELESS)
def test_a_state_that_does_not_fit_is_passed_over_and_training_starts_anew(
        case, halfway, demo, corpus, capsys):
    shutil.copytree(halfway / "parts", "parts")
    spoil, reason = USELESS[case]
    spoil(state_of("parts", "rnn"))
    cfg = demo[0]._replace(output_dir="parts", epochs_rnn=2)
    er.train_system(cfg, "rnn", demo[1], corpus, "cpu")

    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "passed over" in line]
    assert "TextRNN_training.pth" in line and reason in line
    assert "goes on after" not in output
    assert_same_training("rnn", halfway / "whole", "parts")
    assert not state_of("parts", "rnn").exists()
    assert not Path("executed").exists()


def leave_out_plots(patch):
    """No plot is drawn, no report written: several seconds of a run on which no training hangs."""
    patch.setattr(er, "save_figure", lambda figure, *_, **__: er.plt.close(figure))
    for name in ("draw_plots", "write_report"):
        patch.setattr(er, name, lambda results: None)


def main_without_plots(argv):
    """What is killed ten times."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        er.main(argv)


def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(
        finished, processes, tmp_path, monkeypatch):
    command = "--device cpu --phase fusion --run-models fusion_rnn --ravdess-path".split()
    command += [str(finished / CORPUS), *"--epochs-cnn 2 --epochs-rnn 2 --epochs-fusion 2".split()]

    def run(folder, seconds=None):
        """The exit code of the command in a new process, which is killed after so many seconds."""
        monkeypatch.chdir(folder)
        process = processes.Process(target=main_without_plots, args=(command,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    start = time.perf_counter()
    assert run(whole) == 0
    length = time.perf_counter() - start
    lengths = length * np.random.default_rng(0).uniform(0.05, 0.3, 10)
    codes = [run(killed, seconds) for seconds in lengths]
    assert codes.count(-signal.SIGKILL) >= 5
    assert run(killed) == 0

    for name in ("cnn", "rnn", "fusion_rnn"):
        assert_same_training(name, whole / "outputs", killed / "outputs")
    one, two = files_under(whole), files_under(killed)
    assert one.keys() == two.keys()
    for name in ("predictions.csv", "metrics.json", "clips.csv", "audit.json"):
        path = Path("outputs", name)
        assert one[path] == two[path], name


def files_under(folder):
    """The contents of all files in a folder by their relative paths."""
    return {Path(path).relative_to(folder): content for path, content in contents(folder).items()}


# %% Two runs on one folder
QUICK = ["--demo", "--device", "cpu", "--phase", "data", "--run-models", "rnn"]


@pytest.mark.parametrize("command", [
    QUICK,
    [*QUICK, "--output-dir", str(OUTPUT.parent)],
    [*QUICK, "--phase", "report"],
    [*QUICK, "--phase", "unimodal"],
])
def test_a_second_run_on_a_folder_stops_at_once_and_changes_nothing(command, copied):
    before = contents("outputs")
    busy = rf"another run is at work in {OUTPUT}: wait until it ends or name another --output-dir"
    with filelock.FileLock(OUTPUT / ".run.lock"), pytest.raises(er.UserError, match=busy):
        er.main(command)
    assert contents("outputs") == before


def test_recordings_are_answered_while_a_run_is_at_work(copied, capsys):
    path = written("a.wav", speech())
    with filelock.FileLock(OUTPUT / ".run.lock"):
        er.main(["--demo", "--phase", "predict", "--input", str(path)])
    assert "a.wav: " in capsys.readouterr().out


def test_a_run_of_several_folds_keeps_others_out_of_their_folders(finished):
    folder = Path("outputs/fold_1_seed_42")
    folder.mkdir(parents=True)
    command = ["--ravdess-path", str(finished / CORPUS), "--phase", "data"]
    with filelock.FileLock(folder / ".run.lock"):
        for folds in (["--folds", "0,1"], ["--folds", "1", "--output-dir", str(folder)]):
            with pytest.raises(er.UserError, match=f"another run is at work in {folder}"):
                er.main([*command, *folds])


def test_demos_beside_each_other_write_their_corpus_one_after_the_other(monkeypatch):
    def write(folder):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock("archive/demo/run.lock", timeout=0).acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(er, "write_demo_corpus", write)
    with pytest.raises(KeyboardInterrupt):
        er.main(DEMO)
    filelock.FileLock("archive/demo/run.lock", timeout=0).acquire()


def test_a_folder_is_free_again_after_an_error_an_interrupt_and_a_kill(
        copied, processes, monkeypatch, unpublished):
    with pytest.raises(er.UserError, match="none does not exist"):
        er.main(["--ravdess-path", "none", "--output-dir", str(OUTPUT)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, er, "split_clips", 1)
        er.main(QUICK)

    audit = OUTPUT / "audit.json"
    audit.unlink()
    command = ["--ravdess-path", str(CORPUS), "--run-models", "rnn", "--device", "cpu"]
    command += ["--output-dir", str(OUTPUT)]
    holder = processes.Process(target=er.main, args=(command,))
    holder.start()
    while not audit.exists() and holder.is_alive():
        time.sleep(0.01)
    with pytest.raises(er.UserError, match="another run"):
        er.main(QUICK)
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    er.main(QUICK)


def test_results_that_a_killed_run_was_writing_are_not_taken_for_finished_ones(
        rnn_command, monkeypatch, unpublished):
    er.main(rnn_command)
    results = ["predictions.csv", "histories.csv", "config.json"]
    before = {name: Path("outputs", name).read_bytes() for name in results}
    for name in results:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_when_written(patch, name)
            er.main(rnn_command)
        if name != "config.json":
            with pytest.raises(er.UserError, match=r"outputs.config\.json is missing.*--phase all"):
                er.main(["--phase", "report"])
    er.main(rnn_command)
    assert before == {name: Path("outputs", name).read_bytes() for name in results}


def stop_when_written(patch, name):
    """Interrupt whoever has just written a file of this name."""
    replace = Path.replace

    def interrupted(self, target):
        result = replace(self, target)
        if Path(target).name == name:
            raise KeyboardInterrupt
        return result

    patch.setattr(Path, "replace", interrupted)


@pytest.mark.parametrize(("flag", "shown"), [
    ("--help", "--epochs-cnn"),
    ("--version", er.__version__),
])
def test_help_and_version_need_no_lock(flag, shown, capsys):
    Path("outputs").mkdir()
    with filelock.FileLock("outputs/.run.lock"), pytest.raises(SystemExit) as stop:
        er.main([flag])
    assert stop.value.code == 0
    assert shown in capsys.readouterr().out


def test_a_report_of_nothing_leaves_nothing():
    with pytest.raises(er.UserError, match=r"none.config\.json is missing"):
        er.main(["--phase", "report", "--output-dir", "none"])
    assert not Path("none").exists()


# %% Whisper
@pytest.fixture
def tiny_whisper(tmp_path, monkeypatch):
    """A checkpoint of random weights in Whisper's own format; no program is found, ffmpeg neither."""
    from whisper.model import ModelDimensions, Whisper
    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 16, 2, 1, 51865, 16, 16, 2, 1)
    model = Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)  # Whisper leaves it as the memory was
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, "little.pt")
    monkeypatch.setenv("PATH", "")
    return str(tmp_path / "little.pt")


@pytest.fixture
def decoded(monkeypatch):
    """What Whisper decodes, clip by clip; what random weights say looks invented, but counts here."""
    from dataclasses import replace

    from whisper.model import Whisper
    decode, clips = Whisper.decode, []

    def counted(self, mel, options):
        clips.append(mel.shape)
        return replace(decode(self, mel, options), no_speech_prob=0.0, compression_ratio=1.0)

    monkeypatch.setattr(Whisper, "decode", counted)
    return clips


WHISPER_JSON = Path("outputs/transcripts_whisper.json")


def test_whisper_goes_on_where_it_was_stopped(tiny_whisper, decoded, demo, monkeypatch):
    from whisper.model import Whisper
    cfg = config(use_simulated_sentences=False, whisper_model=tiny_whisper)
    clips = demo[1][:10].drop(columns="transcript")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, Whisper, "decode", 2)
        er.transcribe(clips, cfg, "cpu")
    kept = read_json(WHISPER_JSON)
    assert len(kept) == len(decoded) == 1

    texts = er.transcribe(clips, cfg, "cpu")["transcript"]
    assert len(decoded) == 10
    assert set(texts.map(type)) == {str}
    assert max(map(len, texts)) > 0
    assert kept.items() <= read_json(WHISPER_JSON).items()
    assert er.transcribe(clips, cfg, "cpu")["transcript"].equals(texts)
    assert len(decoded) == 10


def test_whisper_knows_clips_and_its_weights_by_their_content(tiny_whisper, decoded, demo):
    clips = demo[1][:2]
    cfg = config(use_simulated_sentences=False, whisper_model=tiny_whisper)
    first = er.transcribe(clips, cfg, "cpu")

    shutil.copy(tiny_whisper, "renamed.pt")
    renamed = clips.assign(clip=["a", "b"], path=["moved/a.wav", "moved/b.wav"])
    again = er.transcribe(renamed, cfg._replace(whisper_model="renamed.pt"), "cpu")
    assert again["transcript"].equals(first["transcript"])
    assert len(decoded) == 2

    content = torch.load(tiny_whisper, weights_only=True)
    torch.save(content | {"more": 1}, "renamed.pt")  # other bytes under the name of before
    er.transcribe(clips, cfg._replace(whisper_model="renamed.pt"), "cpu")
    assert len(decoded) == 4

    # What is heard of a file may be another channel.
    other = clips.assign(samples=clips["samples"].map(lambda samples: samples[::-1].copy()))
    er.transcribe(other, cfg, "cpu")
    assert len(decoded) == 6


def test_whisper_transcripts_feed_a_run_that_is_no_oracle(tiny_whisper, decoded, finished, unpublished):
    for path in (finished / CORPUS).rglob("03-01-*-01-01-01-0[1-3].wav"):
        touch("few", path.name)
        shutil.copy(path, "few")
    command = ["--ravdess-path", "few", "--no-use-simulated-sentences", "--whisper-model", tiny_whisper]
    er.main([*command, "--run-models", "rnn", "--phase", "unimodal", *TINY])

    results = er.read_results("outputs")
    assert results.config["caveats"] == []
    assert results.titles["rnn"] == "TextRNN"
    assert "Word error rate of Whisper: " in str(results.config["audit"])
    clips = pd.read_csv("outputs/clips.csv", keep_default_na=False)
    texts = dict(zip(clips["clip"], clips["transcript"]))
    assert len(texts) == 24
    assert max(map(len, texts.values())) > 0
    assert pickle.loads(Path("outputs/ravdess_transcripts_whisper.pkl").read_bytes()) == texts
    assert sorted(read_json(WHISPER_JSON).values()) == sorted(texts.values())
    by_clip = results.predictions.set_index("clip")["transcript"]
    assert by_clip.to_dict() == texts


def pretend_to_hear(patch, text, no_speech=0.1, logprob=-0.3, compression=1.0):
    """Let a Whisper that always says the same be loaded, with these signs of what it is worth."""
    import whisper
    result = whisper.DecodingResult(
        audio_features=None, language="en", text=text, no_speech_prob=no_speech, avg_logprob=logprob,
        compression_ratio=compression)
    model = SimpleNamespace(
        dims=SimpleNamespace(n_mels=80), device=torch.device("cpu"), decode=lambda mel, options: result)
    patch.setattr(er, "load_whisper", lambda *_: (whisper, model))


def test_transcripts_that_are_all_empty_are_counted_as_wrong(finished, monkeypatch, unpublished):
    pretend_to_hear(monkeypatch, "")
    command = ["--ravdess-path", str(finished / CORPUS), "--no-use-simulated-sentences", "--device", "cpu"]
    er.main([*command, "--run-models", "rnn", "--phase", "data"])
    audit = read_json("outputs/audit.json")["audit"]
    assert "96 of 96 transcripts are empty." in audit
    assert any(line.startswith("Word error rate of Whisper: 100.0%") for line in audit)


@pytest.mark.parametrize(("text", "words"), [
    ("I don't KNOW, really_1!", ["i", "don't", "know", "really_1"]),
    ("Ça où naïve 한국어 말", ["ça", "où", "naïve", "한국어", "말"]),
    ("我很开心。", [*"我很开心"]),
    ("とてもうれしい", [*"とてもうれしい"]),
    ("カラオケ に", [*"カラオケに"]),
    ("ฉันดีใจ", [*"ฉันดีใจ"]),
    ("ຂ້ອຍ", [*"ຂ້ອຍ"]),
    ("ខ្ញុំ", [*"ខ្ញុំ"]),
    ("ကောင်း", [*"ကောင်း"]),
    ("hello世界 ok", ["hello", "世", "界", "ok"]),
    ("मैं खुश हूँ", ["मैं", "खुश", "हूँ"]),
    ("cafe\u0301s, don\u2019t", ["caf\u00e9s", "don't"]),
    ("I love it \u2764\ufe0f", ["i", "love", "it"]),
    ("\u2764\ufe0f", ["<unk>"]),
    ("...", ["<unk>"])])
def test_where_a_script_has_no_spaces_each_character_is_a_word(text, words):
    assert er.words_in(text) == words


@pytest.mark.parametrize(("statement", "heard", "wrong"), [
    (1, "Kids are talking by the door.", 0),
    (2, "dogs are SITTING by the door", 0),
    (1, "", 6),
    (1, "Kids are walking by the door", 1),
    (2, "Dogs sitting by the door", 1),
    (1, "The kids are talking by", 3),
])
def test_word_error_rate_of_counted_cases(statement, heard, wrong):
    right = "Kids are talking by the door"
    clips = pd.DataFrame({"statement": [statement, 1], "transcript": [heard, right]})
    assert er.word_error_rate(clips) == wrong / 12


@pytest.mark.parametrize(("no_speech", "logprob", "compression", "text"), [
    (0.1, -0.3, 1.0, "Thank you."),
    (0.9, -0.3, 1.0, "Thank you."),
    (0.9, -1.5, 1.0, ""),
    (0.1, -0.3, 9.0, ""),
])
def test_what_whisper_makes_out_of_silence_is_an_empty_transcript(
        no_speech, logprob, compression, text, demo, monkeypatch):
    pretend_to_hear(monkeypatch, " Thank you. ", no_speech, logprob, compression)
    clips = er.transcribe(demo[1][:1], config(), "cpu")
    assert list(clips["transcript"]) == [text]


# %% Speech encoders
@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """A folder with a tiny encoder of random weights for each of five families, in transformers' format."""
    import transformers
    folder, make = tmp_path_factory.mktemp("encoders"), transformers
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    waves = small | {
        "conv_dim": (16,) * 7, "conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    whisper = make.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=100, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1)
    torch.manual_seed(0)
    for name, model, extractor in (
            ("wav2vec2", make.Wav2Vec2Model(make.Wav2Vec2Config(**waves)), make.Wav2Vec2FeatureExtractor()),
            ("wavlm", make.WavLMModel(make.WavLMConfig(**waves)), make.Wav2Vec2FeatureExtractor()),
            ("w2v-bert", make.Wav2Vec2BertModel(make.Wav2Vec2BertConfig(**small)),
             make.SeamlessM4TFeatureExtractor()),
            ("ast", make.ASTModel(make.ASTConfig(**small)), make.ASTFeatureExtractor()),
            ("whisper", make.WhisperModel(whisper), make.WhisperFeatureExtractor())):
        model.save_pretrained(folder / name)
        extractor.save_pretrained(folder / name)
    return folder


FAMILIES = ["wav2vec2", "wavlm", "w2v-bert", "ast", "whisper"]
SPEECH = ["--demo", "--run-models", "speech", "--device", "cpu"]


def encoder_of(*flags):
    """The frozen encoder that flags name."""
    return er.SpeechEncoder.prepare(er.parse_settings(["--device", "cpu", *flags]))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_speech_encoder_of_transformers_can_be_heard_with(
        family, encoders, finished, unpublished, monkeypatch):
    shutil.copytree(finished / "archive", "archive")
    for views in ("views", "training_views"):  # the plain one alone, which is faster
        monkeypatch.setattr(er.SpeechEncoder, views, er.SpeechEncoder.views[:1])
    er.main([*SPEECH, "--speech-encoder", str(encoders / family)])
    line = figures()["speech"]
    assert line["clips"] == 32
    checkpoint = er.read_checkpoint(config(output_dir=str(OUTPUT)), "speech")
    assert checkpoint.weights["head.weight"].shape == (8, 3 * 16)
    assert checkpoint.spec["encoder"] == encoder_of("--speech-encoder", str(encoders / family)).key

    written("a.wav", speech())
    table = er.Predictor(OUTPUT).predict("a.wav")
    assert table["predicted"]["SpeechEncoder"] in er.EMOTIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_clips_of_any_length_are_heard_alone(family, encoders):
    encoder = encoder_of("--speech-encoder", str(encoders / family))
    cfg = config(phase="predict")
    for seconds in (0.02, 1.0, 2.5):
        samples = np.resize(speech(), int(seconds * RATE))
        features = er.speech_features(samples, (1.0, ""), encoder, cfg, "cpu")
        assert features.shape == (3 * 16,)
        assert np.isfinite(features).all()
    steps = encoder.states(np.resize(speech(), 2 * RATE)).shape[1]
    assert steps == {"ast": 1214, "whisper": 100}.get(family, 99)


def test_whisper_hears_30_seconds_as_its_own_code_does(tiny_whisper, monkeypatch):
    import whisper
    monkeypatch.setattr(er, "training_precision", lambda device: torch.float32)
    samples = np.resize(speech(), 30 * RATE)
    encoder = encoder_of("--whisper-model", tiny_whisper)
    model = whisper.load_model(tiny_whisper)
    with torch.inference_mode():
        expected = model.encoder(whisper.log_mel_spectrogram(samples)[None])
        states = encoder.states(samples)
        assert torch.allclose(states[-1], expected[0], atol=1e-4)
        longer = encoder.states(np.resize(speech(), 40 * RATE))  # no more positions than that
    assert longer.shape == states.shape == (2, 1500, 16)
    assert encoder.states(samples[:2 * RATE]).shape == (2, 100, 16)


def test_an_encoder_is_known_by_its_weights(tiny_whisper):
    content = torch.load(tiny_whisper, weights_only=True)
    torch.save(content | {"more": 1}, "renamed.pt")
    assert encoder_of("--whisper-model", "renamed.pt").key == encoder_of("--whisper-model", tiny_whisper).key
    content["model_state_dict"]["encoder.conv1.bias"] += 1
    torch.save(content, "other.pt")
    assert encoder_of("--whisper-model", "other.pt").key != encoder_of("--whisper-model", tiny_whisper).key


@pytest.fixture
def listened(monkeypatch):
    """The lengths of what an encoder that hears nothing but how high a clip is gets to hear."""
    lengths = []

    def states(samples):
        lengths.append(len(samples))
        return torch.full((2, 5, 3), float(np.abs(np.diff(samples)).mean()))

    encoder = er.SpeechWeights(states, 16000, 6, "levels")
    monkeypatch.setattr(er, "load_speech_encoder", lambda *_: encoder)
    return lengths


def test_features_are_computed_once(listened):
    cfg, encoder = config(), encoder_of()
    samples = speech()

    def features(samples=samples, view=(1.0, ""), encoder=encoder, cfg=cfg):
        return er.speech_features(samples, view, encoder, cfg, "cpu")

    first = features()
    assert features(samples.copy()).tolist() == first.tolist()
    assert len(listened) == 1
    fold = cfg._replace(output_dir="outputs/fold_3_seed_42")
    assert features(cfg=fold).tolist() == first.tolist()
    assert len(listened) == 1  # runs share them

    features(view=(0.9, ""))
    features(view=(1.0, "noise"))
    features(encoder=encoder._replace(key="another"))
    features(samples=samples[:-1])
    features(cfg=cfg._replace(sampling_rate=8000))
    assert len(listened) == 6


def test_recordings_that_are_answered_leave_nothing_in_the_cache(listened):
    er.speech_features(speech(), (1.0, ""), encoder_of(), config(phase="predict"), "cpu")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("spoil", [lambda path: cut(path, 40), lambda path: path.write_bytes(b"")])
def test_a_cache_that_was_cut_off_is_made_again(spoil, listened):
    encoder = encoder_of()
    first = er.speech_features(speech(), (1.0, ""), encoder, config(), "cpu")
    path, = Path("outputs/cache").glob("*.npy")
    spoil(path)
    assert er.speech_features(speech(), (1.0, ""), encoder, config(), "cpu").tolist() == first.tolist()
    assert len(listened) == 2
    assert np.load(path).tolist() == first.tolist()


def test_listening_goes_on_where_it_was_stopped(listened, finished, unpublished, monkeypatch):
    shutil.copytree(finished / "archive", "archive")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, np, "save", 7)
        er.main(SPEECH)
    assert len(listened) == 7
    er.main(SPEECH)
    # Three speeds of all clips and two disturbed copies of those of training; six are not heard twice.
    clips = pd.read_csv(OUTPUT / "clips.csv")
    training = sum(clips["split"] == "train")
    assert len(listened) == 1 + 3 * len(clips) + 2 * training


def test_two_runs_may_hear_the_same_clip_at_once(listened):
    encoder, cfg = encoder_of(), config()
    samples = [np.roll(speech(), place) for place in range(20)] * 8

    def features(wave):
        return er.speech_features(wave, (1.0, ""), encoder, cfg, "cpu").tolist()

    found = er.in_parallel(features, samples)
    assert found == found[:20] * 8
    names = {path.name for path in Path("outputs/cache").iterdir()} - {".lock"}
    assert len(names) == 20
    assert all(name.endswith(".npy") for name in names)


def test_a_disk_that_fills_while_listening_is_one_sentence(listened, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(er.UserError, match=r"cache.*No space left.*--output-dir"):
        er.speech_features(speech(), (1.0, ""), encoder_of(), config(), "cpu")


def test_a_clip_is_heard_at_one_level_however_loud_it_is(tiny_whisper):
    encoder = encoder_of("--whisper-model", tiny_whisper)
    first = er.speech_features(speech(), (1.0, ""), encoder, config(), "cpu")
    for decibels in (-60, -20, 20):
        louder = speech() * np.float32(10 ** (decibels / 20))
        features = er.speech_features(louder, (1.0, ""), encoder, config(), "cpu")
        assert np.allclose(features, first, atol=1e-2)
    silence = er.speech_features(np.zeros(RATE, np.float32), (1.0, ""), encoder, config(), "cpu")
    assert np.isfinite(silence).all()


def test_speeds_change_the_length_of_what_is_heard(listened):
    for speed in (0.9, 1.0, 1.1):
        er.speech_features(speech(), (speed, ""), encoder_of(), config(), "cpu")
    expected = [len(speech()) / speed for speed in (0.9, 1.0, 1.1)]
    assert listened == pytest.approx(expected, abs=2)


def test_noise_is_5_to_25_db_below_a_clip_and_the_same_each_time():
    levels = []
    for seed in range(40):
        samples = np.random.default_rng(seed).standard_normal(RATE).astype(np.float32)
        noise = er.disturbed(samples, RATE, "noise") - samples
        assert np.array_equal(er.disturbed(samples, RATE, "noise") - samples, noise)
        levels.append(20 * np.log10(np.linalg.norm(samples) / np.linalg.norm(noise)))
    assert 5 <= min(levels) < 10
    assert 20 < max(levels) <= 25


def test_a_telephone_carries_300_to_3400_hz():
    samples = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32)
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    before, after = (np.abs(np.fft.rfft(x)) ** 2 for x in (samples, er.disturbed(samples, RATE, "telephone")))
    for low, high, least, most in ((0, 200, 0, 0.01), (400, 3300, 0.95, 1.05), (4000, 8000, 0, 0.01)):
        band = (low <= hertz) & (hertz < high)
        assert least <= after[band].sum() / before[band].sum() <= most
    assert er.disturbed(samples, RATE, "") is samples


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_the_head_of_speech_is_scikit_learns(classes, listened, monkeypatch):
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    emotions = pd.Categorical.from_codes(np.arange(40) % classes, er.EMOTIONS[:classes])
    sounds = [rng.normal(0, 0.1 + code, RATE // 2).astype(np.float32) for code in emotions.codes]
    clips = pd.DataFrame({"emotion": emotions, "samples": sounds, "mel": [np.zeros((20, 64))] * 40})
    cfg = config(speech_c=1.0)
    model = er.SpeechEncoder(classes, 0.4, "levels", 6)
    dataset = er.ClipDataset(clips, model, cfg, "cpu", augment=True)
    assert model.fit(dataset, None, cfg) == (model, [])

    views = []
    for dataset.view in er.SpeechEncoder.training_views:
        views.append(dataset[list(range(40))]["speech"])
    speech = torch.cat(views)
    features = ((speech - speech.mean(dim=0)) / speech.std(dim=0)).numpy()
    head = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    head.fit(features, np.tile(emotions.codes, 5))
    expected = head.predict_proba(features)
    with torch.no_grad():
        found = model.eval()({"speech": speech}).softmax(dim=1).numpy()
    assert np.allclose(found, expected, atol=1e-4)


def test_where_weights_cannot_be_had_the_row_says_why_and_the_rest_runs(
        copied, unpublished, monkeypatch, capsys):
    for name in ("speech", "bert", "fusion_bert", "attention_bert"):
        er.file_of(config(output_dir=str(OUTPUT)), name).unlink()
    refusal = er.UserError("--whisper-model base cannot be loaded (no network)")

    def offline(*_):
        raise refusal
    monkeypatch.setattr(er, "load_speech_encoder", offline)
    monkeypatch.setattr(er, "load_text_encoder", offline)
    er.main(DEMO)
    missing = er.read_results(OUTPUT).config["not_run"]
    assert set(missing.values()) == {str(refusal)}
    lost = {name for name in SHOWN if er.inputs_of(name) & {"speech", "input_ids"}}
    assert set(missing) == lost
    assert set(figures()) == set(SHOWN) - lost
    assert "cannot run: --whisper-model base" in capsys.readouterr().out


def test_weights_that_the_command_line_names_must_be_there(finished):
    shutil.copytree(finished / "archive", "archive")
    for flags in (["--whisper-model", "gone.pt"], ["--speech-encoder", "gone"], ["--bert-model", "gone"]):
        with pytest.raises(er.UserError, match=f"{flags[0]} gone"):
            er.main([*DEMO, *flags])


def test_when_no_weights_are_there_at_all_the_reason_is_the_end(finished, monkeypatch):
    shutil.copytree(finished / "archive", "archive")

    def offline(*_):
        raise er.UserError("no network")
    monkeypatch.setattr(er, "load_speech_encoder", offline)
    with pytest.raises(er.UserError, match="no network"):
        er.main(SPEECH)


def spoiled(source, change):
    """A copy of an encoder's folder, changed."""
    folder = Path(shutil.copytree(source, "spoiled"))
    change(folder)
    return folder


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "spoiled cannot be loaded"),
    (lambda folder: (folder / "model.safetensors").unlink(), "spoiled cannot be loaded"),
    (lambda folder: cut(folder / "model.safetensors", 5000), "spoiled cannot be loaded"),
    (lambda folder: spoil_json(folder / "config.json", lambda content: content.update(num_hidden_layers=3)),
     "it lacks the weights of"),
])
def test_a_broken_speech_encoder_is_one_sentence(change, sentence, encoders):
    folder = spoiled(encoders / "wavlm", change)
    with pytest.raises(er.UserError, match=f"--speech-encoder .*{sentence}") as error:
        encoder_of("--speech-encoder", str(folder))
    assert "\n" not in str(error.value)


def test_an_encoder_of_words_cannot_hear(finished):
    with pytest.raises(er.UserError, match=r"--speech-encoder .* cannot be loaded"):
        encoder_of("--speech-encoder", str(finished / ENCODER))


def test_confidence_below_which_more_answers_are_wrong_than_right():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.45, 0.55]])
    assert er.fit_threshold(probabilities, np.array([0, 0, 1, 1, 0])) == 0.7
    assert er.fit_threshold(probabilities, np.array([0, 1, 0, 0, 1])) == 0.9
    assert er.fit_threshold(probabilities, np.array([0, 0, 1, 0, 1])) == 0.55


def test_answers_that_are_more_often_wrong_are_unsure_also_where_confidences_tie():
    tied = np.array([[0.6, 0.4]] * 4)
    assert er.fit_threshold(tied, np.array([0, 1, 1, 1])) == math.inf
    assert er.fit_threshold(tied, np.array([1, 0, 0, 0])) == 0.6
    assert er.fit_threshold(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([1, 1])) == math.inf


@pytest.fixture
def predictor(finished):
    """The models of the finished demo."""
    return er.Predictor(finished / OUTPUT, whisper_model=str(finished / DEMO_WHISPER))


def test_who_hears_and_was_best_on_validation_stands_first(predictor, output):
    table = predictions(output).query("split == 'validation'")
    losses = er.score(table, er.EMOTIONS, ["system"])["nll"]
    assert predictor.first == losses.drop(filter(er.reads_words, losses.index)).idxmin()
    written("a.wav", speech())
    answers = predictor.predict("a.wav", text="What a day.")
    assert answers.index[0] == er.SYSTEMS[predictor.first].title
    assert sorted(answers.index) == sorted(TITLES.values())


def test_an_answer_is_unsure_below_the_threshold_of_its_system(predictor):
    written("a.wav", speech())
    for threshold, unsure in ((0.0, False), (1.1, True)):
        predictor.thresholds = dict.fromkeys(predictor.thresholds, threshold)
        table = predictor.predict("a.wav", text="What a day.")
        assert set(table["unsure"]) == {unsure}
        assert set(table["predicted"]) <= set(er.EMOTIONS)
        assert set(predictor.predict_over_time("a.wav")["unsure"]) == {unsure}


def test_the_console_says_unsure(predictor, capsys):
    line = dict.fromkeys(er.EMOTIONS, 0.125) | {
        "recording": "a.wav", "error": "", "predicted": "sad", "unsure": True, "model": "AudioCNN",
        "note": "", "gate": "level", "text": None, "text_source": "--text", "over_time": ""}
    er.print_answer([line], er.EMOTIONS)
    assert "a.wav: sad (unsure)" in capsys.readouterr().out


def pretend_no_speech(patch, probabilities):
    """Let Whisper give these no-speech probabilities, one after the other."""
    patch.setattr(er, "decode_with_whisper", lambda *_, **__: SimpleNamespace(
        no_speech_prob=next(probabilities), avg_logprob=-0.3, compression_ratio=1.0, text=""))


@pytest.mark.parametrize(("probability", "predicted"), [(0.2, "an emotion"), (0.8, "no speech")])
def test_whisper_says_what_is_speech(probability, predicted, predictor, monkeypatch):
    pretend_no_speech(monkeypatch, itertools.repeat(probability))
    line = predictor.predict(speech(), RATE).iloc[0]
    assert (line["predicted"] == "no speech") == (predicted == "no speech")
    assert line["gate"].startswith(f"Whisper, no-speech probability {probability:.2f}")
    course = predictor.predict_over_time(speech(), RATE)
    assert set(course["predicted"] == "no speech") == {predicted == "no speech"}


def test_of_a_long_recording_each_half_minute_may_be_noise(predictor, monkeypatch):
    pretend_no_speech(monkeypatch, iter([0.1, 0.9, 0.1]))
    without_pauses = er.load_clip(speech(), predictor.cfg, RATE).samples
    course = predictor.predict_over_time(np.resize(without_pauses, 70 * RATE), RATE)
    silent = course.loc[course["predicted"] == "no speech", "start"]
    assert silent.min() == pytest.approx(30, abs=1.5)
    assert silent.max() == pytest.approx(60, abs=1.5)
    assert len(silent) == pytest.approx(30 / 1.28, abs=2)


def test_a_refusal_says_what_may_have_been_heard(predictor, monkeypatch, capsys, copied):
    pretend_no_speech(monkeypatch, itertools.repeat(0.8))
    written("a.wav", speech())
    er.main([*PREDICTING, "a.wav"])
    out = capsys.readouterr().out
    assert "a.wav: no speech" in out
    assert "music or noise? (Whisper, no-speech probability 0.80" in out


def test_another_encoder_than_that_of_training_is_passed_over(finished, tiny_whisper, capsys):
    other = torch.load(tiny_whisper, weights_only=True)
    other["model_state_dict"]["encoder.conv1.bias"] += 1
    torch.save(other, "other.pt")
    predictor = er.Predictor(finished / OUTPUT, whisper_model="other.pt")
    assert "another encoder than that of --whisper-model other.pt" in capsys.readouterr().err
    assert "SpeechEncoder" not in predictor.predict(speech(), RATE).index


def test_an_encoder_that_is_gone_is_named_by_its_flag(finished, copied, capsys):
    DEMO_WHISPER.unlink()
    sentence = f"--whisper-model {DEMO_WHISPER} cannot be loaded"
    assert "AudioCNN" in er.Predictor(OUTPUT).predict(speech(), RATE).index
    assert sentence in capsys.readouterr().err

    path, elsewhere = str(written("a.wav", speech())), str(finished / DEMO_WHISPER)
    er.main([*PREDICTING, path, "--whisper-model", elsewhere])
    assert "SpeechEncoder" in capsys.readouterr().out
    for name in set(er.TRAINED) - {"speech"}:
        er.file_of(config(output_dir=str(OUTPUT)), name).unlink()
    with pytest.raises(er.UserError, match=sentence):
        er.main([*PREDICTING, path])


@pytest.fixture
def shipped(finished, monkeypatch):
    """A folder of this file with a trained SpeechEncoder beside it."""
    path = Path("product/archive/SpeechEncoder_best.pth")
    path.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, "product")
    shutil.copy(finished / OUTPUT / path.name, path)
    shutil.copytree(finished / "archive", "archive")  # where its Whisper lies
    monkeypatch.setattr(er, "__file__", str(Path("product/emotion_recognition.py").absolute()))
    return path


def test_where_nothing_was_trained_the_model_that_comes_with_the_file_answers(shipped, capsys):
    written("a.wav", speech())
    er.main(["--input", "a.wav"])
    assert "SpeechEncoder" in capsys.readouterr().out
    table = er.Predictor().predict("a.wav")
    assert list(table.index) == ["SpeechEncoder"]


def test_a_demo_or_an_evaluation_in_the_output_folder_is_no_trained_model(shipped):
    shutil.copytree(shipped.parent, "outputs/demo")
    assert er.Predictor().caveats == er.Predictor(shipped.parent).caveats
    assert er.Predictor().cfg.output_dir == str(shipped.parent.absolute())
    shutil.copy(shipped, "outputs")  # what was trained here comes first
    assert er.Predictor().cfg.output_dir == "outputs"


def test_the_model_that_comes_with_the_file_was_made_by_the_code_of_today():
    checkpoint = er.read_checkpoint(config(output_dir=str(SCRIPT.parent / "archive")), "speech")
    python, code = checkpoint.fingerprint["made"].split()
    if python != "{}.{}".format(*sys.version_info):
        pytest.skip(f"keys of code are those of Python {python}")
    assert code == er.code_of("speech")  # else run archive/head.py again


def test_the_model_that_comes_with_the_file_was_made_with_the_settings_of_today():
    checkpoint = er.read_checkpoint(config(output_dir=str(SCRIPT.parent / "archive")), "speech")
    today = config()._asdict()
    made = {key: value for key, value in checkpoint.fingerprint.items() if key in today}
    assert {"seed", "sampling_rate", "trim_db", "speech_c"} <= set(made)
    assert made == {key: str(today[key]) for key in made}
    assert checkpoint.classes == er.EMOTIONS
    assert set(checkpoint.windows["split"]) == {"validation"}
    assert Path(SCRIPT.parent, "archive/SpeechEncoder_best.pth").stat().st_size < 400_000


def test_when_only_the_script_was_copied_the_missing_file_is_named(shipped):
    shipped.unlink()
    with pytest.raises(er.UserError, match=r"outputs holds no trained model, and .*SpeechEncoder_best\.pth"):
        er.main(["--input", str(written("a.wav", speech()))])


def test_a_folder_that_is_named_is_not_replaced_by_the_model_that_comes_with_the_file(shipped):
    with pytest.raises(er.UserError, match="mistyped holds no trained model"):
        er.main(["--input", str(written("a.wav", speech())), "--output-dir", "mistyped"])


@pytest.fixture
def head(monkeypatch):
    """The script that trains the model which comes with the file; it writes that to shipped/."""
    module = companion(SCRIPT.with_name("archive") / "head.py")
    monkeypatch.setattr(module, "TARGET", Path("shipped/SpeechEncoder_best.pth").absolute())
    return module


@pytest.mark.parametrize("flag", ["--demo", "--manifest=m.csv", "--leave-out=calm"])
def test_the_model_that_comes_with_the_file_is_made_of_nothing_else(flag, head):
    with pytest.raises(er.UserError, match=f", trained on all of RAVDESS, has no use for {flag}: "):
        head.main([flag])
    assert not head.TARGET.exists()


def test_the_model_that_comes_with_the_file_is_made_actor_by_actor_and_says_nothing_of_a_machine(
        finished, head, monkeypatch):
    heard, asked, train, infer = {}, [], er.train, er.infer

    def training(kind, parts, clips, *rest):
        model, history = train(kind, parts, clips, *rest)
        heard[model] = set(clips.loc[clips["split"] == "train", "actor"])
        return model, history

    def answering(model, windows, *rest):
        asked.append((heard[model], set(windows["actor"])))
        return infer(model, windows, *rest)

    weights = str(finished / DEMO_WHISPER)
    with monkeypatch.context() as patch:
        patch.setattr(er, "train", training)
        patch.setattr(er, "infer", answering)
        head.main(["--ravdess-path", str(finished / CORPUS), "--whisper-model", weights, "--device", "cpu",
                   "--output-dir", str(finished / OUTPUT), "--speech-c", "0.1"])

    # Each actor is answered by a head that heard the five others; the last head hears all.
    actors = {1, 2, 3, 4, 5, 6}
    assert asked == [(actors - {actor}, {actor}) for actor in sorted(actors)]
    assert [*heard.values()][-1] == actors
    content = head.TARGET.read_bytes()
    assert str(finished).encode() not in content
    assert str(Path.home()).encode() not in content

    checkpoint = er.read_checkpoint(config(output_dir="shipped"), "speech")
    assert checkpoint.settings == er.parse_settings([])._replace(speech_c=0.1)._asdict()
    assert set(checkpoint.windows["split"]) == {"validation"}
    assert checkpoint.log_probs.shape == (3, 96, 8)
    assert torch.isfinite(checkpoint.log_probs).all()
    predictor = er.Predictor("shipped", whisper_model=weights)
    answer = predictor.predict(speech(), RATE)
    assert list(answer.index) == ["SpeechEncoder"]
    assert answer["predicted"].iloc[0] in er.EMOTIONS
    assert predictor.caveats == [head.CAVEAT]


def test_adapting_hears_other_speakers_and_no_labels(listened, monkeypatch):
    rng = np.random.default_rng(0)
    emotions = pd.Categorical.from_codes(np.tile([0, 1], 20), er.EMOTIONS[:2])
    hertz = 200.0 * (1 + emotions.codes) + rng.normal(0, 5, 40)

    def tones(hertz):
        time = np.arange(RATE // 2) / RATE
        return [np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in hertz]

    windows = pd.DataFrame({
        "emotion": emotions, "samples": tones(hertz), "mel": [np.zeros((20, 64))] * 40, "clip": range(40),
        "actor": np.repeat([1, 2, 3, 4, 5], 8), "voiced": 1.0})
    cfg = config(speech_c=1.0)
    model = er.SpeechEncoder(2, 0.4, "levels", 6)
    model.fit(er.ClipDataset(windows, model, cfg, "cpu", augment=True), None, cfg)
    checkpoint = er.Checkpoint(
        "speech", model.spec, model.state_dict(), er.EMOTIONS[:2], "", (), {}, {}, [], {},
        er.infer(model, windows, cfg, "cpu"))

    def right(log_probs):
        return float((log_probs.mean(dim=0).argmax(dim=1).numpy() == emotions.codes).mean())

    # Elsewhere everything is three times as high: all sounds like the second class.
    abroad = windows.assign(samples=tones(3 * hertz))
    assert right(er.infer(model, windows, cfg, "cpu")) == 1
    assert right(er.infer(model, abroad, cfg, "cpu")) == 0.5
    assert right(er.adapted(abroad, checkpoint, cfg, "cpu")) == 1
    turned = abroad.assign(emotion=pd.Categorical.from_codes(1 - emotions.codes, er.EMOTIONS[:2]))
    assert torch.equal(er.adapted(turned, checkpoint, cfg, "cpu"), er.adapted(abroad, checkpoint, cfg, "cpu"))

    # One clip that is higher still moves the answers to other speakers, and none to its own.
    plain = er.adapted(abroad, checkpoint, cfg, "cpu")
    first = abroad.index == 16  # of speaker 3
    moved = er.adapted(abroad.assign(samples=tones(hertz * np.where(first, 15, 3))), checkpoint, cfg, "cpu")
    own = torch.tensor((abroad["actor"] == 3) & ~first)
    others = torch.tensor(abroad["actor"] != 3)
    assert torch.equal(moved[:, own], plain[:, own])
    assert not torch.allclose(moved[:, others], plain[:, others], atol=1e-2)


def test_evaluate_shows_speech_plain_and_adapted(copied, unpublished):
    flags = own_corpus(er.EMOTIONS)
    er.main(["--phase", "evaluate", "--output-dir", str(OUTPUT), *flags])
    found = figures(OUTPUT / "evaluation_corpus")
    assert {"speech", "speech_adapted"} <= set(found)
    titles = er.read_results(OUTPUT / "evaluation_corpus").titles
    assert "uses unlabelled clips of this corpus" in titles["speech_adapted"]
    assert "speech_adapted" not in er.read_results(OUTPUT).config["not_run"]


def test_a_checkpoint_of_before_there_was_speech_answers(copied):
    cfg = config(output_dir=str(OUTPUT))
    for name in set(er.TRAINED) - {"cnn"}:
        er.file_of(cfg, name).unlink()
    path = er.file_of(cfg, "cnn")
    content = torch.load(path, weights_only=True)
    for key in ("whisper_language", "speech_encoder", "speech_c"):
        del content["settings"][key]
    torch.save(content, path)
    assert er.Predictor(OUTPUT).predict(speech(), RATE)["predicted"]["AudioCNN"] in er.EMOTIONS


def test_a_predictor_knows_no_settings_of_a_training(finished):
    with pytest.raises(er.UserError, match="knows no settings but whisper_model"):
        er.Predictor(finished / OUTPUT, sampling_rate=8000)


@pytest.mark.parametrize(("setting", "value", "named"), [
    ("test_views", 0, "--test-views: 0 is not of type int from 1 to 5"),
    ("channel", -1, "--channel: -1 is not of type int from 0"),
    ("channel", "left", "--channel: left"),
    ("ask_systems", ["speech"], "--ask-systems"),
])
def test_settings_of_a_predictor_are_checked_like_flags(setting, value, named, finished):
    with pytest.raises(er.UserError, match=re.escape(named)):
        er.Predictor(finished / OUTPUT, **{setting: value})
    assert er.Predictor(finished / OUTPUT, test_views="1").cfg.test_views == 1


def test_weights_are_asked_for_only_when_something_is_trained(copied, monkeypatch, unpublished):
    def offline(*_):
        raise er.UserError("no network")
    monkeypatch.setattr(er, "load_text_encoder", offline)
    er.main([*DEMO, "--bert-model", str(ENCODER)])
    assert "bert" in figures()


def test_edited_features_are_computed_anew(listened, monkeypatch):
    er.speech_features(speech(), (1.0, ""), encoder_of(), config(), "cpu")
    monkeypatch.setattr(er, "code_from", lambda *_: "edited")
    er.speech_features(speech(), (1.0, ""), encoder_of(), config(), "cpu")
    assert len(listened) == 2


def test_a_network_for_sound_that_is_no_encoder_is_one_sentence(encoders, monkeypatch):
    monkeypatch.setattr(er, "transformer_states", lambda *_: 1 / 0)
    with pytest.raises(er.UserError, match=r"--speech-encoder .* cannot be loaded .division by zero"):
        encoder_of("--speech-encoder", str(encoders / "wavlm"))


def test_an_emotion_that_nobody_names_has_its_true_share(output):
    results = er.read_results(output)
    table = results.predictions.assign(predicted="angry")
    shares = er.shares_table(er.replace(results, predictions=table))
    assert shares.loc["true"].tolist() == ["12.5 %"] * 8
    assert shares.loc["AudioCNN", "angry"] == "100.0 %"


def test_shares_of_answers_stand_beside_those_of_the_clips(output):
    results = er.read_results(output)
    table = er.shares_table(results)
    assert table.loc["true"].tolist() == ["12.5 %"] * 8
    first = results.test[results.test["system"] == "cnn"]["predicted"].value_counts(normalize=True)
    assert table.loc["AudioCNN"].tolist() == [er.percent(first.get(emotion, 0)) for emotion in er.EMOTIONS]
    lines = table_in(output / DOCUMENT.name, "sad", "How often each emotion is named")
    assert lines[er.EMOTIONS].to_numpy().tolist() == table.to_numpy().tolist()


def test_the_setting_of_speech_and_its_encoder_train_it_anew_and_those_of_networks_do_not(demo):
    cfg, clips = demo
    other = cfg._replace(speech_c=1.0)
    assert er.stale_because(other, "speech", clips) == "speech_c 0.003 -> 1.0"
    assert er.stale_because(other, "cnn", clips) == ""
    networks = {f"epochs_{suffix}": 9 for suffix in ("cnn", "rnn", "bert", "fusion")}
    assert er.stale_because(cfg._replace(batch_size=7, mixup=0.0, **networks), "speech", clips) == ""

    content = torch.load(cfg.whisper_model, weights_only=True)
    content["model_state_dict"]["encoder.conv1.bias"] += 1
    torch.save(content, "other.pt")
    another = cfg._replace(whisper_model="other.pt")
    assert er.stale_because(another, "speech", clips) == "speech encoder changed"
    assert er.stale_because(another, "cnn", clips) == ""


# %% Notebook
def as_notebook(**constants):
    """The script as a notebook whose constants are edited, with a small demo."""
    source = SCRIPT.read_text(encoding="utf-8").replace("actors=range(1, 25)", "actors=range(1, 7)")
    for name, value in constants.items():
        constant = re.compile(rf"^{name} = \S+", re.MULTILINE)
        source, count = constant.subn(f"{name} = {value!r}", source)
        assert count == 1, name
    return jupytext.reads(source, fmt="py:percent")


def test_the_script_is_a_notebook():
    """The demo by constants, figures inline; edited constants, %run and import work; errors are sentences."""
    epochs = {name: 1 for name in er.SETTINGS if name.startswith("EPOCHS")}
    notebook = as_notebook(DEMO=True, RUN_MODELS="rnn", **epochs)
    metadata, title = notebook.cells[:2]
    assert metadata.cell_type == "code"
    assert metadata.source.startswith("# /// script")
    assert title.cell_type == "markdown"
    assert len(notebook.cells) >= 20

    data = f"--ravdess-path {CORPUS} --phase data --run-models rnn"
    more = [
        "DEMO, RAVDESS_PATH = False, 'nowhere'\nmain()",
        f"%run {SCRIPT} --ravdess-path nowhere",
        f"%run {SCRIPT} {data}",
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport emotion_recognition\n"
        f"emotion_recognition.main({data.split()})"]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in more]
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", allow_errors=True).execute()

    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    run, edited, refused, by_run, imported = outputs[-5:]
    figures = [output for output in run if "image/png" in output.get("data", {})]
    plots = list((OUTPUT / "plots").glob("*.png"))
    assert len(figures) == len(plots) >= 5
    assert "edits of the code are not noticed in a notebook" in str(run)
    assert "Report: " in str(run)
    assert (OUTPUT / "emotion_recognition_report.docx").exists()
    assert "96 clips of 6 actors are used" in str(by_run)
    assert "96 clips of 6 actors are used" in str(imported)

    everything = itertools.chain(*outputs)
    errors = [output for output in everything if output["output_type"] == "error"]
    assert errors == [edited[-1], refused[-1]]
    for error in errors:
        assert error["ename"] == "UserError"
        assert "nowhere does not exist" in error["evalue"]
        assert error["traceback"] == [f"error: {error['evalue']}"]
    assert "SystemExit" not in str(outputs)


# %% Bad input that works
LIKE_OTHERS = {  # other files with the same sound
    "24 bits": lambda: written("a.wav", speech(), subtype="PCM_24"),
    "float": lambda: written("a.wav", speech(), subtype="FLOAT"),
    "stereo": lambda: written("a.wav", np.stack([speech(), speech()], axis=1)),
    "FLAC": lambda: written("a.flac", speech()),
}
UNLIKE_OTHERS = {
    "8 kHz": lambda: written("a.wav", speech(8000), 8000),
    "48 kHz": lambda: written("a.wav", speech(48000), 48000),
    "8 bits": lambda: written("a.wav", speech(), subtype="PCM_U8"),
    "one channel": lambda: written("a.wav", np.stack([speech(), 0 * speech()], axis=1)),
    "quiet": lambda: written("a.wav", speech() * 0.006),
    "Vorbis": lambda: written("a.ogg", speech(), subtype="VORBIS"),
    "MP3": lambda: written("a.mp3", speech(), subtype="MPEG_LAYER_III"),
    "0.3 s": lambda: written("a.wav", speech()[6000:10800]),
    "10 minutes": lambda: written("a.wav", np.resize(speech(8000), 8000 * 600), 8000),
}


@pytest.mark.parametrize("kind", [*LIKE_OTHERS, *UNLIKE_OTHERS])
def test_a_recording_works(kind, demo):
    cfg, clips = demo
    write = (LIKE_OTHERS | UNLIKE_OTHERS)[kind]
    mel = er.load_clip(write(), cfg).mel
    plain = er.load_clip(written("plain.wav", speech()), cfg).mel
    assert mel.shape[1:] == plain.shape[1:]
    assert len(mel) > 10 and np.isfinite(mel).all()
    if kind in LIKE_OTHERS:
        assert mel.shape == plain.shape
        assert np.abs(mel.astype(float) - plain).mean() < 0.03

    clip = clips[:1].assign(mel=pd.Series([mel], dtype=object))
    for augment in (False, True):
        window = batch_of(er.AudioCNN, clip, cfg, augment)["mel"]
        assert window.shape == (1, 1, 64, 160)
        assert window.isfinite().all()


# %% Bad input that is left out
def with_sample(path, value):
    """Write speech that ends in one impossible sample."""
    return written(path, np.append(speech(), np.float32(value)), subtype="FLOAT")


BROKEN = {  # what is wrong with a clip: (how it is made so, the reason)
    "header cut": (lambda path: cut(path, 20), "cut off: less data than its header says"),
    "data cut": (lambda path: cut(path, path.stat().st_size // 2), "cut off: less data than its header says"),
    "zero length": (lambda path: cut(path, 0), "not readable: it is empty"),
    "text": (lambda path: path.write_text("no sound"), "not readable (Format not recognised)"),
    "no samples": (lambda path: written(path, speech()[:0]), "no samples in it"),
    "silence": (lambda path: written(path, 0 * speech()), "silent"),
    "NaN": (lambda path: with_sample(path, np.nan), "NaN, infinite or huge samples"),
    "infinite": (lambda path: with_sample(path, np.inf), "NaN, infinite or huge samples"),
    "huge": (lambda path: with_sample(path, 1e7), "NaN, infinite or huge samples"),
    "wrong code": (
        lambda path: path.rename(path.with_name("03-01-09-01-02-01-03.wav")),
        "a code in its name is none of RAVDESS's"),
}


def test_unusable_clips_are_named_and_left_out_and_the_run_goes_on(finished, capsys, unpublished):
    shutil.copytree(finished / CORPUS, "corpus")
    reasons, of_training = {}, itertools.product((3, 4), range(1, 9))
    for (actor, emotion), (spoil, reason) in zip(of_training, BROKEN.values()):
        path = Path("corpus", f"Actor_{actor:02}/03-01-{emotion:02}-01-02-01-{actor:02}.wav")
        renamed = spoil(path)
        if isinstance(renamed, Path):
            path = renamed
        reasons[str(path)] = reason

    er.main(["--ravdess-path", "corpus", "--phase", "unimodal", "--run-models", "rnn", *TINY])
    audit, output = read_json("outputs/audit.json")["audit"], capsys.readouterr().out
    left = 96 - len(BROKEN)
    assert f"96 files in corpus: {left} clips of 6 actors are used" in audit[0]
    assert f"left out: unusable {len(BROKEN)} " in audit[0]
    sentences = [sentence for sentence in audit if sentence.startswith("Left out: ")]
    expected = [f"Left out: {path}: {reason}." for path, reason in reasons.items()]
    assert sorted(sentences) == sorted(expected)
    assert "\n".join(sentences) in output

    table = pd.read_csv("outputs/left_out.csv")
    assert dict(zip(table["path"], table["reason"])) == reasons
    assert len(predictions("outputs")) == left


@pytest.mark.parametrize("length", ["cut", "unknown"])
def test_a_flac_file_without_its_end_or_its_length_is_left_out(length):
    path = written("a.flac", speech())
    content = bytearray(path.read_bytes())
    if length == "cut":
        content = content[:len(content) // 2]
    else:
        content[21] &= 0xF0
        content[22:26] = bytes(4)  # the number of samples, 36 bits
    path.write_bytes(content)
    with pytest.raises(er.AudioError, match=r"cut off|not readable"):
        er.load_clip(path, config())


# %% Bad input that ends the run
def remove(pattern, folder="own"):
    for path in list(Path(folder).rglob(pattern)):
        if path.is_file():
            path.unlink()


def break_clips(pattern, folder="own"):
    for path in Path(folder).rglob(pattern):
        path.write_text("no sound")


def change_encoder(folder, old, new):
    """A copy of the demo's text encoder with other texts in its JSON files."""
    from transformers import AutoTokenizer
    shutil.copytree(ENCODER, folder)
    AutoTokenizer.from_pretrained(ENCODER).save_pretrained(folder)
    for path in Path(folder).glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def without_layer(folder):
    """A copy of the demo's text encoder that lacks the weights of a layer."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(ENCODER, folder)
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    for key in list(weights):
        if "layer.1." in key:
            del weights[key]
    save_file(weights, path, metadata={"format": "pt"})


def break_torchaudio(patch):
    """Put a torchaudio first whose library does not fit the installed torch."""
    touch(".", "torchaudio/functional.py")
    Path("torchaudio/__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    for name in list(sys.modules):
        if name.startswith("torchaudio"):
            patch.delitem(sys.modules, name)
    patch.syspath_prepend(str(Path.cwd()))


def missing(package):
    """What makes a package impossible to import."""
    return lambda patch: patch.setitem(sys.modules, package, None)


def spoil_json(path, change):
    content = read_json(path)
    change(content)
    er.save(path, content)


def spoil_table(path, change):
    er.save(path, change(pd.read_csv(path, keep_default_na=False)))


def third_of_sound(line, last="sad", first="happy", **options):
    """What writes a manifest with this line as its third, whose files are sound."""
    def write(_):
        manifest(f"a.wav,{first},1,train", line, f"c.wav,{last},2,test", **options)
        for name in "abc":
            written(f"{name}.wav", speech())

    return write


CONFIG, OWN_CSV = OUTPUT / "config.json", "--manifest m.csv"
OWN, REPORT = f"--ravdess-path {CORPUS}", "--demo --phase report"
PREDICTED, HISTORIES = OUTPUT / "predictions.csv", OUTPUT / "histories.csv"
PREDICT, EVALUATE = "--demo --phase predict --input own", f"--phase evaluate --output-dir {OUTPUT}"
TRAIN, TABLE = f"{OWN} --phase unimodal --run-models rnn", f"{OWN} --sentences-csv s.csv"
WHISPER = f"{OWN} --phase unimodal --run-models rnn --no-use-simulated-sentences --whisper-model"
KEPT = f"{WHISPER} a.pt --output-dir {OUTPUT}"
TRANSCRIPTS = OUTPUT / "transcripts_whisper.json"

ONE_SENTENCE = {  # what is wrong: (command line, what the sentence must name, how it is made so)
    # Flags
    "mistyped flag": ("--epoch-cnn 3", "--epoch-cnn|did you mean --epochs-cnn?"),
    "abbreviated flag": ("--epochs-cn 3", "--epochs-cn"),
    "wrong type": ("--epochs-cnn many", "--epochs-cnn|many is not of type int"),
    "no epochs": ("--epochs-cnn 0", "--epochs-cnn|0 is not of type int from 1"),
    "share above one": ("--dropout 1.5", "--dropout|1.5|from 0.0 to 0.99"),
    "not a number": ("--mixup nan", "--mixup|nan"),
    "unknown phase": ("--phase train", "--phase|train|fusion"),
    "unknown model": ("--run-models cnn,lstm", "--run-models|lstm|fusion_rnn"),
    "unknown fold": ("--folds 0,7", "--folds|0,7"),
    "a fold twice": ("--folds 1,1", "--folds|different"),
    "folds of a random split": ("--folds 0,1 --split random", "--folds|--split random"),
    "a window too short": ("--clip-seconds 0.1", "--clip-seconds 0.1|16 frames of --hop-length"),
    "no such device": (
        f"{OWN} --device cuda", "--device cuda is not available|--device cpu",
        lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False)),
    "demo and corpus": (f"{OWN} --demo", "--ravdess-path|--demo"),
    "manifest and demo": (f"--demo {OWN_CSV}", "--manifest m.csv|--demo"),
    "manifest and corpus": (f"{OWN} {OWN_CSV}", "--manifest m.csv|--ravdess-path"),
    "nothing to do": (
        f"{OWN} --phase fusion --run-models rnn", "--run-models rnn|--phase fusion|nothing to do"),

    # The corpus
    "no corpus": ("", f"zenodo.org|--ravdess-path|--demo|{Path(er.RAVDESS_PATH)}|kaggle|--download"),
    "no such path": ("--ravdess-path nowhere", "nowhere does not exist|--ravdess-path|--download"),
    "path is a file": ("--ravdess-path it", "it holds no clips|--ravdess-path", lambda _: touch(".", "it")),
    "path is empty": (
        "--ravdess-path none", "none holds no clips|--ravdess-path", lambda _: Path("none").mkdir()),
    "other audio": (
        "--ravdess-path own", "own holds no clips named like 03-01-|--ravdess-path",
        lambda _: (remove("*.wav"), touch("own", "memo.wav"))),
    "only wrong codes": (
        "--ravdess-path own", "own holds no clips|--ravdess-path",
        lambda _: (remove("*.wav"), touch("own", "03-01-09-01-01-01-01.wav"))),
    "only broken clips": (
        "--ravdess-path own", "96 clips cannot be used|Actor_01/03-01-01-01-01-01-01.wav: not readable|"
        "own has no clip that can be used|--ravdess-path", lambda _: break_clips("*.wav")),
    "one actor": ("--ravdess-path own", "1 actor|--ravdess-path", lambda _: remove("*-0[2-6].wav")),
    "too few actors": (
        "--ravdess-path own --folds 3", "3 actor|fold 3|--folds", lambda _: remove("*-0[4-6].wav")),
    "vanished class": (
        "--ravdess-path own", "no disgust clip is left for train|own|--ravdess-path",
        lambda _: remove("03-01-07-*")),
    "vanished class of a split": (
        "--ravdess-path own", "no disgust clip is left for|own/Actor_06|--ravdess-path|--leave-out disgust",
        lambda _: remove("03-01-07-*-0[1-5].wav")),
    "broken class of a split": (
        "--ravdess-path own", "10 clips cannot be used|own/Actor_01/03-01-07|not readable|"
        "no disgust clip is left for", lambda _: break_clips("03-01-07-*-0[1-5].wav")),
    "too few clips to deal": (
        "--ravdess-path own --split random", "too few clips of some emotion|random split|--leave-out",
        lambda _: (remove("03-01-07-*-0[1-5].wav"), remove("03-01-07-*-01-01-06.wav"))),
    "broken torchaudio": (OWN, 'torchaudio|OSError|pip install "torch', break_torchaudio),

    # Where results go
    "no place to write": (f"{OWN} --output-dir it/x", "it/x cannot be written|--output-dir",
                          lambda _: touch(".", "it")),
    "a demo in a real run": (
        "--demo", f"{OUTPUT} holds a real run|--output-dir",
        lambda _: spoil_json(CONFIG, lambda config: config["settings"].update(demo=False))),
    "the loss explodes": (f"{TRAIN} --learning-rate-rnn 1e6 --epochs-rnn 30",
                          "training loss is|in epoch|lower --learning-rate-rnn"),

    # The report
    "nothing to report": (
        "--phase report --output-dir none", f"{Path('none', 'config.json')} is missing|--phase all"),
    "other settings": (f"{REPORT} --epochs-cnn 9", f"--epochs-cnn=9 contradicts {CONFIG}|1"),
    "no predictions": (REPORT, f"{PREDICTED} is missing|--phase all", lambda _: PREDICTED.unlink()),
    "config cut": (REPORT, f"{CONFIG}|not readable|--phase all", lambda _: cut(CONFIG, 200)),
    "predictions cut": (REPORT, f"{PREDICTED}|--phase all", lambda _: cut(PREDICTED, 9000)),
    "predictions empty": (REPORT, f"{PREDICTED}|--phase all", lambda _: cut(PREDICTED, 0)),
    "histories cut": (REPORT, f"{HISTORIES}|--phase all", lambda _: cut(HISTORIES, 200)),
    "no histories": (REPORT, f"{HISTORIES} is missing|--phase all", lambda _: HISTORIES.unlink()),
    "config of another kind": (REPORT, f"{CONFIG}|--phase all", lambda _: CONFIG.write_text("[1]")),
    "config that is a number": (REPORT, f"{CONFIG}|--phase all", lambda _: CONFIG.write_text("5")),
    "config of other data": (
        REPORT, f"{CONFIG} is not of the data beside it, audit.json|--phase all",
        lambda _: spoil_json(OUTPUT / "audit.json", lambda audit: audit["audit"].append("more"))),
    "config of an older version": (
        REPORT, f"{CONFIG}|--phase all",
        lambda _: spoil_json(CONFIG, lambda config: config.pop("classes"))),
    "config without settings": (
        REPORT, f"{CONFIG}|--phase all",
        lambda _: spoil_json(CONFIG, lambda config: config.pop("settings"))),
    "predictions of another kind": (
        REPORT, f"{PREDICTED}|--phase all", lambda _: PREDICTED.write_text("a,b\n1,2\n")),
    "predictions without a probability": (
        REPORT, f"{PREDICTED}|--phase all",
        lambda _: spoil_table(PREDICTED, lambda table: table.drop(columns="sad"))),
    "predictions of another corpus": (
        REPORT, f"{PREDICTED}|--phase all",
        lambda _: spoil_table(PREDICTED, lambda table: table.replace({"emotion": {"sad": "odd"}}))),
    "histories of another kind": (
        REPORT, f"{HISTORIES}|--phase all", lambda _: HISTORIES.write_text("a,b\n1,2\n")),

    # One's own recordings
    "no recording named": ("--demo --phase predict", "--input"),
    "no such recording": ("--demo --phase predict --input a.wav", "a.wav|does not exist|--input"),
    "no recordings": (PREDICT, "own|holds no recordings|--input", lambda _: remove("*")),
    "a recording of text": (
        "--demo --phase predict --input a.wav", "a.wav cannot be used|not readable|--input",
        lambda _: touch(".", "a.wav")),
    "a video of text": (
        "--demo --phase predict --input a.mp4", "a.mp4 cannot be used|not readable as audio|--input",
        lambda _: touch(".", "a.mp4")),
    "nothing trained": (
        "--phase predict --input own --output-dir none",
        "none holds no trained model|--phase all|--output-dir"),
    "several runs": (
        "--phase predict --input own --output-dir many", f"several runs|{Path('many', 'fold_0_seed_42')}",
        lambda _: touch("many/fold_0_seed_42", "TextRNN_best.pth")),
    "recordings, other settings": (f"{PREDICT} --n-mels 80", "--phase predict has no use for --n-mels=80: "),
    "recordings, only words known": (
        f"{PREDICT}/Actor_01/03-01-01-01-01-01-01.wav", "read words|--text",
        lambda _: (remove("AudioCNN_*", OUTPUT), remove("Speech*", OUTPUT), remove("TextBERT_*", OUTPUT),
                   remove("*Fusion_*", OUTPUT), DEMO_WHISPER.unlink())),

    # Text encoder and sentences
    "tokenizer of another family": (
        f"{OWN} --bert-model other", "--bert-model other cannot be loaded|special tokens|--run-models",
        lambda _: change_encoder("other", "[MASK]", "<mask>")),
    "BERT without weights": (
        f"{OWN} --bert-model own",
        "--bert-model own cannot be loaded (|--run-models cnn,speech,rnn,fusion_rnn",
        lambda _: touch("own", "config.json")),
    "BERT with half its weights": (
        f"{OWN} --bert-model half",
        "--bert-model half cannot be loaded|it lacks the weights of transformer.layer.1.|--run-models",
        lambda _: without_layer("half")),
    "BERT without hub": (
        f"{OWN} --bert-model no/one",
        "--bert-model no/one cannot be loaded (|--run-models cnn,speech,rnn,fusion_rnn"),
    "no transformers": (
        f"{OWN} --bert-model no/one", "transformers does not load|pip install transformers|--run-models",
        missing("transformers")),
    "a sentence of no emotion": (TABLE, "s.csv line 3|'bored' is none of neutral|--sentences-csv",
                                 lambda _: write_sentences("s.csv", "bored,So what.")),
    "a sentence twice": (TABLE, "s.csv line 3|line 2 again|--sentences-csv",
                         lambda _: write_sentences("s.csv", "happy,Sentence neutral 0!")),
    "a sentence without words": (TABLE, "s.csv line 3|no words",
                                 lambda _: write_sentences("s.csv", "happy,...")),
    "a comma too many": (TABLE, "s.csv line 3|columns",
                         lambda _: write_sentences("s.csv", "happy,Well, yes.")),
    "too few sentences": (TABLE, "s.csv has 4 of 5|surprised",
                          lambda _: write_sentences("s.csv", "sad,One more.", last=4)),
    "no sentence table": (TABLE, "s.csv is not readable as CSV|--sentences-csv"),
    "other columns": (TABLE, "s.csv line 1 must name the columns emotion and sentence",
                      lambda _: Path("s.csv").write_text("a,b\n1,2\n")),
    "no Whisper": (f"{WHISPER} base", "whisper does not load|pip install openai-whisper", missing("whisper")),
    "no such Whisper": (f"{WHISPER} no-such", "--whisper-model no-such cannot be loaded|checkpoint"),
    "Whisper out of reach": (
        f"{OWN} --run-models speech", "--whisper-model base cannot be loaded (URLError)|--whisper-model"),
    "Whisper of text": (f"{WHISPER} a.pt", "--whisper-model a.pt", lambda _: touch(".", "a.pt")),
    "Whisper of others": (f"{WHISPER} a.pt", "--whisper-model a.pt", lambda _: torch.save({"a": 1}, "a.pt")),
    "transcripts cut": (KEPT, f"{TRANSCRIPTS}|not readable|delete it",
                        lambda _: TRANSCRIPTS.write_text('{"a b": "So')),
    "transcripts of others": (KEPT, f"{TRANSCRIPTS} holds no transcripts|delete it",
                              lambda _: TRANSCRIPTS.write_text("[1]")),
    "transcripts, hostile": (KEPT, f"{TRANSCRIPTS}|not readable|delete it",
                             lambda _: TRANSCRIPTS.write_bytes(pickle.dumps(Hostile()))),

    # Another corpus
    "no manifest": (OWN_CSV, "m.csv is not readable as CSV|--manifest"),
    "manifest, no emotions": (
        OWN_CSV, "m.csv line 1 must name the columns path and emotion|--manifest",
        third("b.wav", header="path,feeling")),
    "manifest, no path": (OWN_CSV, "m.csv line 3|no path|--manifest", third(",sad,1,train")),
    "manifest, no emotion": (OWN_CSV, "m.csv line 3|no emotion", third("b.wav, ,1,train")),
    "manifest, a path twice": (OWN_CSV, "m.csv line 3|line 2 again", third("./a.wav,sad,1,train")),
    "manifest, a path in two spellings": (
        OWN_CSV, "m.csv line 3|the path of line 2 again", third("deep/../a.wav,sad,1,train")),
    "manifest, a link to a listed file": (
        OWN_CSV, "m.csv line 3|the path of line 2 again",
        lambda _: (Path("b.wav").symlink_to("a.wav"), manifest("a.wav,sad,1,", "b.wav,sad,1,"))),
    "manifest, a segment twice": (
        OWN_CSV, "m.csv line 3|the path of line 2 again",
        lambda _: manifest("a.wav,sad,0,1", "a.wav,happy,,1.0", header="path,emotion,start,end")),
    "manifest, no such split": (OWN_CSV, "m.csv line 3|'held'|validation", third("b.wav,sad,1,held")),
    "manifest, no split": (OWN_CSV, "m.csv line 3|''|validation", third("b.wav,sad,1,")),
    "manifest, no speaker": (OWN_CSV, "m.csv line 3|no speaker", third("b.wav,sad,,train")),
    "manifest, a line break in a cell": (
        OWN_CSV, "m.csv line 4|no speaker",
        lambda _: manifest(
            'a.wav,happy,1,"So\nit is"', "b.wav,sad,,x", header="path,emotion,speaker,transcript")),
    "manifest, a column's name": (OWN_CSV, "m.csv line 3|'accuracy'", third("b.wav,Accuracy,1,test")),
    "manifest, a comma too many": (OWN_CSV, "m.csv line 3|quote", third("b.wav,so, so,1,train")),
    "manifest, a column twice": (
        OWN_CSV, "m.csv line 1|none twice|--manifest",
        third("b.wav,sad,1,odd", header="path,emotion,speaker,emotion")),
    "manifest, nan for an emotion": (OWN_CSV, "m.csv line 3|no emotion", third("b.wav,NaN,1,train")),
    "manifest, nan for a speaker": (OWN_CSV, "m.csv line 3|no speaker", third("b.wav,sad,<NA>,train")),
    "manifest, Windows-1252": (
        OWN_CSV, "m.csv line 3|UTF-8|--manifest",
        lambda _: Path("m.csv").write_bytes("path,emotion\na.wav,sad\nb.wav,\u00e4rger".encode("cp1252"))),
    "manifest, a quote after a backslash": (
        OWN_CSV, "m.csv line 3|a quote is written twice|--manifest",
        third(r'b.wav,sad,1,"He said \"no\", twice"')),
    "manifest, no seconds": (
        OWN_CSV, "m.csv line 3|start 'soon' and end ''|seconds",
        lambda _: manifest("a.wav,happy,0", "b.wav,sad,soon", header="path,emotion,start")),
    "manifest, an end before the start": (
        OWN_CSV, "m.csv line 3|start '2' and end '1'|seconds",
        lambda _: manifest("a.wav,sad,0,1", "a.wav,happy,2,1", header="path,emotion,start,end")),
    "manifest, a zero byte": (OWN_CSV, "m.csv|zero byte|--manifest", third("b.wav,sad\0,1,train")),
    "manifest, one emotion": (OWN_CSV, "m.csv|two emotions", third("b.wav,HAPPY,1,train", "happy")),
    "manifest, no lines": (
        OWN_CSV, "m.csv lists no clips|--manifest", lambda _: Path("m.csv").write_text("path,emotion\n,,\n")),
    "manifest, no files": (
        OWN_CSV, "3 clips cannot be used|a.wav: it does not exist|m.csv has no clip|--manifest",
        lambda patch: (third("b.wav,sad,1,test")(patch), remove("[abc].wav", "."))),
    "manifest, files of a class missing": (
        "--manifest own/corpus.csv --run-models cnn", "4 clips cannot be used|own/sound/004.wav|"
        "it does not exist|no sad clip is left for train|--manifest",
        lambda _: (own_corpus(["happy", "sad"]), remove("00[4-7].wav"))),
    "manifest, folds of a split": (
        f"{OWN_CSV} --folds 1", "m.csv has a column split|--folds", third_of_sound("b.wav,sad,1,train")),
    "manifest, runs of a split": (
        f"{OWN_CSV} --runs 2", "m.csv has a column split|--runs", third_of_sound("b.wav,sad,1,train")),
    "manifest, split twice": (
        f"{OWN_CSV} --split random", "m.csv has a column split|--split",
        third_of_sound("b.wav,sad,1,train")),
    "manifest, nobody's folds": (
        f"{OWN_CSV} --folds 1", "m.csv has no column speaker|--folds",
        third_of_sound("b.wav,sad", header="path,emotion,a,b")),
    "manifest, nobody's split": (
        f"{OWN_CSV} --split speaker", "m.csv has no column speaker|--split",
        third_of_sound("b.wav,sad", header="path,emotion,a,b")),
    "manifest, a split empty": (
        "--manifest own/corpus.csv --run-models cnn", "no happy|for test|(see --manifest)",
        lambda _: own_corpus(["happy", "sad"], split=lambda *_: "train")),
    "manifest, two speakers": (
        "--manifest own/corpus.csv --run-models cnn", "2 actor|--manifest|--split",
        lambda _: own_corpus(["happy", "sad"], [1, 2])),
    "manifest, no words": (
        f"{OWN_CSV} --run-models rnn", "no sentences for odd|transcript|m.csv|--sentences-csv",
        third_of_sound("b.wav,odd,1,train")),
    "manifest, sentences of others": (
        f"{OWN_CSV} --sentences-csv s.csv", "s.csv line 3|'odd' is none of happy, sad|--sentences-csv",
        lambda patch: (third_of_sound("b.wav,sad,1,train")(patch),
                       write_sentences("s.csv", "odd,Well.", emotions=["happy", "sad"]))),
    "evaluate, no manifest": ("--phase evaluate", "--phase evaluate|--manifest"),
    "evaluate, other settings": (
        f"--manifest own/corpus.csv {EVALUATE} --n-mels 32", f"--n-mels=32 contradicts {OUTPUT}|64",
        lambda _: own_corpus(["happy", "sad"])),
    "evaluate, no model": (
        f"{OWN_CSV} --phase evaluate --output-dir none", "none holds no trained model|--output-dir"),
    "evaluate, nothing in common": (
        f"{OWN_CSV} {EVALUATE}", "m.csv has no emotion|neutral|--manifest",
        third_of_sound("b.wav,odd,1,2", first="bored", last="weird", header="path,emotion,a,b")),
}


@pytest.mark.parametrize("case", ONE_SENTENCE)
def test_bad_input_ends_with_one_sentence_and_nothing_lost(case, copied, monkeypatch, unpublished):
    argv, named, *make_so = ONE_SENTENCE[case]
    if " own" in argv:
        shutil.copytree(CORPUS, "own")
    for spoil in make_so:
        spoil(monkeypatch)
    before = contents("outputs")
    common = []
    if not {"report", "evaluate", "predict"} & set(argv.split()):
        common = [*TINY, "--bert-model", str(ENCODER)]
    with pytest.raises(er.UserError) as stop:
        er.main([*common, *argv.split()])
    message, after = str(stop.value), contents("outputs")
    assert "\n" not in message
    for words in named.split("|"):
        assert words in message, message
    assert {path: after.get(path) for path in before} == before
    assert not Path("executed").exists()


# %% Checkpoints that cannot be used
def of_another_system(path):
    """Copy the checkpoint of a model onto that of another one."""
    others = {"AudioCNN_best.pth": "TextRNN_best.pth"}
    shutil.copy(path.with_name(others.get(path.name, "AudioCNN_best.pth")), path)


def of_an_older_version(path):
    """A checkpoint as commit 97b141e wrote it: the same weights, but its own temperature and scores."""
    new = torch.load(path, weights_only=True)
    torch.save({"weights": new["weights"], "temperature": 1.5, "scores": {"uar": 0.5}}, path)


def lacking(path, *keys):
    """A checkpoint without some of what it must hold."""
    content = torch.load(path, weights_only=True)
    for key in keys:
        del content[key]
    torch.save(content, path)


UNUSABLE = {  # what is wrong with a checkpoint: (how it is made so, what is said)
    "cut": (lambda path: cut(path, 5000), "is not a usable checkpoint ("),
    "empty": (lambda path: cut(path, 0), "is not a usable checkpoint ("),
    "text": (lambda path: path.write_text("no model"), "is not a usable checkpoint ("),
    "foreign": (lambda path: torch.save({"a": 1}, path), "is not a usable checkpoint ("),
    "foreign list": (lambda path: torch.save([1], path), "is not a usable checkpoint ("),
    "incomplete": (lambda path: lacking(path, "log_probs"), "is not a usable checkpoint ("),
    "hostile": (lambda path: torch.save(Hostile(), path), "is not a usable checkpoint ("),
    "hostile pickle": (
        lambda path: path.write_bytes(pickle.dumps(Hostile())), "is not a usable checkpoint ("),
    "old": (of_an_older_version, "was made by an older version"),
    "another system": (of_another_system, "another system"),
}


@pytest.fixture
def models(demo):
    """The settings of a folder that holds the checkpoints of the demo, but for attention and speech."""
    cfg = unfinished(demo, "models", 1)
    remove("Attention*", "models")
    remove("Speech*", "models")
    return cfg


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_first_checkpoint_that_cannot_be_used_ends_predict_and_evaluate_with_a_sentence(case, models):
    spoil, said = UNUSABLE[case]
    path = er.file_of(models, "cnn")
    spoil(path)
    touch(".", "a.wav", "m.csv")
    for argv in (["--phase", "predict", "--input", "a.wav"], ["--phase", "evaluate", "--manifest", "m.csv"]):
        with pytest.raises(er.UserError) as stop:
            er.main([*argv, "--output-dir", "models", "--device", "cpu"])
        message = str(stop.value)
        assert message.startswith(f"{path} ") and said in message
        assert "train " in message
        assert "\n" not in message
    assert not Path("executed").exists()


@pytest.mark.parametrize("case", UNUSABLE)
def test_another_checkpoint_that_cannot_be_used_is_passed_over_with_a_warning(case, models, capsys):
    spoil, said = UNUSABLE[case]
    path = er.file_of(models, "rnn")
    remove("EarlyFusion*", "models")
    spoil(path)
    predictor = er.Predictor("models")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} ") and said in line
    answers = predictor.predict(speech(), RATE, text="What a day")
    answered = ["cnn", "bert", "late_bert", "learned_bert"]
    assert list(answers.index) == [er.SYSTEMS[name].title for name in answered]
    assert not Path("executed").exists()


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_checkpoint_that_cannot_be_used_is_trained_anew_and_kept(case, models, demo, corpus):
    spoil, said = UNUSABLE[case]
    path = er.file_of(models, "rnn")
    spoil(path)
    spoilt = path.read_bytes()
    reason = er.stale_because(models, "rnn", demo[1])
    assert reason.startswith(f"{path} ") and said in reason
    er.train_system(models, "rnn", demo[1], corpus, "cpu")
    assert_same_training("rnn", "models", demo[0].output_dir)
    assert path.with_suffix(".previous.pth").read_bytes() == spoilt
    assert not Path("executed").exists()


PART_UNUSABLE = UNUSABLE | {"missing": (Path.unlink, "does not exist")}


@pytest.mark.parametrize("case", PART_UNUSABLE)
def test_a_fusion_whose_part_cannot_be_used_is_trained_anew(case, models, demo):
    spoil, said = PART_UNUSABLE[case]
    path = er.file_of(models, "rnn")
    spoil(path)
    reason = er.stale_because(models, "fusion_rnn", demo[1])
    assert reason.startswith(f"{path} ") and said in reason
    assert er.stale_because(models, "fusion_bert", demo[1]) == ""
    assert not Path("executed").exists()


def test_a_run_trains_the_parts_of_a_fusion_that_it_needs(models, finished, trained, capsys, monkeypatch):
    leave_out_plots(monkeypatch)
    remove("*BERT*", "models")
    old = er.file_of(models, "rnn")
    of_an_older_version(old)
    before = old.read_bytes()
    command = ["--ravdess-path", str(finished / CORPUS), "--output-dir", "models", *TINY]
    er.main([*command, "--phase", "fusion", "--run-models", "fusion_rnn"])
    assert trained == ["rnn", "fusion_rnn"]
    output = capsys.readouterr().out
    plan = re.findall(r"^  (\S.*\S) +(used again|is trained .*)$", output, re.MULTILINE)
    (sound, of_sound), (words, of_words), (fusion, of_fusion) = plan
    assert (sound, of_sound) == ("AudioCNN", "used again")
    assert words == "TextRNN" and of_words.startswith(f"is trained ({old} was made by an older version")
    assert of_words.endswith("train again, the file is kept)")
    assert fusion == "Early fusion, RNN" and of_fusion.startswith("is trained (")
    assert old.with_suffix(".previous.pth").read_bytes() == before


def test_weights_that_do_not_fit_their_network_are_a_sentence(models):
    path = er.file_of(models, "cnn")
    content = torch.load(path, weights_only=True)
    content["weights"].popitem()
    torch.save(content, path)
    with pytest.raises(er.UserError, match="AudioCNN was made by another version of this script: train"):
        er.Predictor("models").predict(speech(), RATE)


def test_a_disk_that_is_full_ends_a_training_with_a_sentence_and_the_old_model_stays(models, demo, corpus):
    """Here no file may grow beyond 100 kB."""
    before, kind = contents("models"), resource.RLIMIT_FSIZE
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (100_000, limits[1]))
    try:
        with pytest.raises(er.UserError, match=r"TextRNN_training\.pth cannot be written .*--output-dir"):
            er.train_system(models, "rnn", demo[1], corpus, "cpu")
    finally:
        resource.setrlimit(kind, limits)
    assert contents("models") == before


def test_a_folder_that_cannot_be_written_ends_a_run_before_anything_is_read(finished, monkeypatch):
    monkeypatch.setattr(er, "read_corpus", None)
    touch(".", "it")
    with pytest.raises(er.UserError, match=r"it/x cannot be written .*: name another --output-dir"):
        er.main(["--ravdess-path", str(finished / CORPUS), "--device", "cpu", "--output-dir", "it/x"])


# %% The command line
def as_script(monkeypatch, *argv):
    """Run the script as its own process would, in this one."""
    import runpy
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(("argv", "named"), [
    ("--epoch-cnn 3", "--epoch-cnn"),
    ("--phase report --output-dir none", "config.json is missing"),
    ("--phase predict --input a.wav", "a.wav' does not exist"),
])
def test_the_command_line_ends_with_exit_code_2_and_one_line(argv, named, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        as_script(monkeypatch, *argv.split())
    output, message = capsys.readouterr()
    assert stop.value.code == 2 and output == ""
    assert message.startswith("error: ") and named in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("own", "policy"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_wants_otherwise(own, policy):
    """OpenMP itself says, when it is loaded, what it took from the environment."""
    environment = os.environ | {"OMP_DISPLAY_ENV": "TRUE", "OMP_WAIT_POLICY": own}
    if not own:
        del environment["OMP_WAIT_POLICY"]
    done = subprocess.run([sys.executable, "-c", "import emotion_recognition"], cwd=SCRIPT.parent,
                          env=environment, capture_output=True, text=True, timeout=100)
    found = re.findall("OMP_WAIT_POLICY *= *'(.*)'", done.stderr)
    assert found and set(found) == {policy}


def test_whoever_has_nothing_is_told_so_before_anything_is_loaded():
    """A real process, without corpus, text encoder and hub."""
    done = run_script()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "zenodo.org" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_epoch_draws_what_one_pass_over_training_and_one_over_validation_draw(demo):
    """Whatever else draws from the generator changes what a seed means."""
    cfg, clips = demo
    states = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = er.TextRNN.start({"classes": 8, "dropout": 0.4}, clips, cfg, {})
        dataset = er.ClipDataset(clips[:64], model, cfg, "cpu", augment=True)
        trainer = er.Trainer(model, cfg, 10, "cpu")
        if by_hand:
            model.train()
            for batch in er.batches_of(dataset, cfg.batch_size, "by hand", shuffle=True):
                trainer.step(batch)
            er.logits_of(trainer.average, dataset)
        else:
            er.fit_epoch(trainer, dataset, dataset, 1)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_long_epoch_shows_where_it_is_and_a_short_one_does_not(worded, unpublished, undrawn, monkeypatch,
                                                               capsys):
    er.main([*worded, "--seed", "1"])
    assert "epoch 1" not in capsys.readouterr().err

    bar = er.tqdm

    def at_once(items, title, total, delay, **options):
        """The bar as if the ten seconds were over."""
        assert delay == 10
        return bar(items, title, total, mininterval=0, **options)

    monkeypatch.setattr(er, "tqdm", at_once)
    er.main([*worded, "--seed", "2"])
    bar = capsys.readouterr().err
    assert re.search(r"epoch 1: +100%.* \d+/\d+ ", bar)


def test_ctrl_c_in_a_training_says_after_which_epoch_and_the_same_command_goes_on(
        finished, unpublished, undrawn, monkeypatch, capsys):
    copy_models(finished, "rnn")
    command = [*DEMO, "--run-models", "rnn", "--epochs-rnn", "3"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        interrupt(patch, er, "fit_epoch", 3)
        er.main(command)
    assert str(stop.value) == "stopped after epoch 2 of 3; the same command goes on from there"

    er.main(command)
    assert "goes on after epoch 2 of 3" in capsys.readouterr().out
    assert len(checkpoint_of("rnn")["history"]) == 3


@pytest.mark.parametrize(("stopped_by", "said", "code"), [
    (KeyboardInterrupt(), "stopped; what is finished is kept", 130),
    (OSError(28, "No space left on device", "a.csv"), "[Errno 28] No space left on device: 'a.csv'", 2),
])
def test_a_run_that_is_stopped_says_so_without_a_traceback(stopped_by, said, code, monkeypatch, capsys):
    def stop(*_, **__):
        raise stopped_by

    monkeypatch.setattr(os, "walk", stop)
    with pytest.raises(SystemExit) as end:
        as_script(monkeypatch, "--phase", "data", "--ravdess-path", "nowhere")
    assert end.value.code == code
    assert capsys.readouterr().err == f"error: {said}\n"


# %% Anything at all: EXAMPLES=10000 pytest -k anything
anything = settings(max_examples=int(os.environ.get("EXAMPLES", 100)), deadline=None)
SOUND = st.sampled_from(["wav", "flac", "ogg", "mp3"])


def damaged(content):
    """Strategy: bytes of which some are overwritten, cut off or put in."""
    place = st.integers(0, len(content))
    change = st.tuples(st.tuples(place, place), st.binary(max_size=20))
    changes = st.lists(change, max_size=4)
    return changes.map(lambda changes: functools.reduce(change_bytes, changes, content))


def change_bytes(content, change):
    """Bytes with others in place of those between two places, or of all behind the first if they are many."""
    places, others = change
    first, second = sorted(places)
    if second - first >= 2000:
        second = len(content)
    return content[:first] + others + content[second:]


@functools.cache
def sound_file(kind):
    """The bytes of a short sound file."""
    memory = io.BytesIO()
    soundfile.write(memory, speech()[:4000], RATE, format=kind)
    return memory.getvalue()


@anything
@given(st.data(), SOUND)
def test_anything_in_an_audio_file_is_a_spectrogram_or_a_reason(data, kind):
    path = Path(f"a.{kind}")
    path.write_bytes(data.draw(damaged(sound_file(kind))))
    try:
        mel = er.load_clip(path, config()).mel
    except er.AudioError as error:
        assert str(error)
        return
    assert mel.shape[1] == 64 and len(mel) > 0
    assert np.isfinite(mel).all()


CODES = st.sampled_from(["00", "01", "02", "03", "08", "09", "3", "13", "24", "111", "-"])
ENDS = st.sampled_from([".wav", ".mp3", ".txt", " (1).wav", ".WAV", ""])
STEMS = st.lists(CODES, min_size=6, max_size=8).map("-".join)
NEARLY = st.from_regex(r"03-01-0[1-9]-0[12]-0[12]-0[12]-[0-2][0-9]", fullmatch=True)
NAMES = st.tuples(STEMS | NEARLY, ENDS).map("".join)


TYPES = st.sampled_from(["int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
RATES = st.sampled_from([0, 999, 1000, 8000, 11025, 16000, 44100, 192000])


@settings(parent=anything, max_examples=anything.max_examples // 3)
@given(TYPES, RATES, st.integers(0, 4), st.floats(0, 3), st.floats(-120, 60), st.floats(-1, 1))
def test_any_array_is_one_clip_of_all_that_is_spoken_or_a_reason(
        kind, rate, channels, seconds, decibels, offset):
    samples = np.resize(speech(), int(seconds * rate)) * 10 ** (decibels / 20) + offset
    if "int" in kind:
        span = np.iinfo(kind)
        samples = (samples * span.max).clip(span.min / 2, span.max / 2)
    if channels:
        samples = np.tile(samples, (channels, 1))
    try:
        clip = er.load_clip(samples.astype(kind), config(), rate)
    except er.UserError as error:
        assert "\n" not in str(error)
        return
    assert np.isfinite(clip.mel).all() and np.isfinite(clip.samples).all()
    assert len(clip.samples) == 256 * len(clip.mel) == 256 * len(clip.seconds)
    assert (np.diff(clip.seconds) > 0).all()
    assert 0 <= clip.seconds[0] <= clip.seconds[-1] <= seconds + 0.1


@anything
@given(st.lists(NAMES, min_size=1, max_size=8))
def test_anything_in_a_name_is_a_right_row_or_left_out_with_a_reason(names):
    shutil.rmtree("any", ignore_errors=True)
    touch("any", *names)
    expected, heard = {}, []
    for path in Path("any").iterdir():
        if path.suffix.lower() not in er.AUDIO_SUFFIXES:
            continue
        heard.append(str(path))
        match = re.fullmatch(r"03-01-0([1-8])-0[12]-0[12]-0[12]-(\d\d)", path.stem)
        if match and match[2] != "00":
            emotion, actor = int(match[1]), int(match[2])
            expected[str(path)] = (path.stem, er.EMOTIONS[emotion - 1], actor)

    files = er.list_ravdess("any")
    if er.FOREIGN in set(files["reason"]):  # one name that RAVDESS cannot have makes all suspect
        assert set(files["reason"]) == {er.FOREIGN}
        return
    if not expected:
        with pytest.raises(er.UserError, match=r"any holds no clips.*--ravdess-path"):
            er.find_corpus(config(ravdess_path="any"))
        return
    clips = files[files["reason"] == ""]
    rows = {row.path: (row.clip, row.emotion, row.actor) for row in clips.itertuples()}
    assert rows == expected
    assert sorted(files["path"]) == sorted(heard)


FLAGS = st.sampled_from([name for name in er.SETTINGS if name != "DEMO"])
NUMBERS = st.integers() | st.floats()
KNOWN = "cnn,rnn 0,1 speaker random both concat -1 1e400 0x10 --demo all".split()
WORDS = st.text(max_size=8) | NUMBERS.map(str) | st.sampled_from(KNOWN)


@anything
@given(st.lists(st.tuples(FLAGS, WORDS), max_size=4))
def test_anything_on_the_command_line_is_settings_or_a_sentence(flags):
    argv = []
    for name, word in flags:
        argv += ["--" + name.lower().replace("_", "-"), word]
    try:
        cfg = er.parse_settings(argv)
    except er.UserError as error:
        assert "\n" not in str(error) or "\n" in "".join(argv)
        return
    for name, kind in er.SETTINGS.items():
        value = getattr(cfg, name.lower())
        assert type(value) in (kind, int, float)
        assert type(value) is kind or kind is float


def rows_of(content, *columns):
    """The texts of some columns of a CSV, line by line, read plainly; line 1 has none of them twice."""
    text = content.decode("utf-8-sig")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    names, *rows = filter(None, lines)
    names = [name.strip().lower() for name in names]
    assert max(map(names.count, columns)) == 1
    texts = []
    for row in rows:
        row = dict(zip(names, map(str.strip, row)))
        texts.append([row.get(column, "") for column in columns])
    return list(filter(any, texts))


SAD, ODD = ([f"{emotion},{emotion} it is {number}." for number in range(6)] for emotion in ("sad", "odd"))
BANK = "\n".join(["emotion,sentence", *SAD, *ODD])
LETTERS = st.sampled_from('a",;\n\r\t \0emotionsentence')
NONSENSE = st.binary(max_size=300) | st.text(LETTERS).map(str.encode)


@anything
@given(NONSENSE | damaged(BANK.encode()))
def test_anything_in_a_sentence_table_is_a_bank_or_a_sentence(content):
    Path("s.csv").write_bytes(content)
    try:
        bank = er.sentence_bank("s.csv", ["sad", "odd"])
    except er.UserError as error:
        assert "s.csv" in str(error) and "\n" not in str(error)
        return
    assert list(bank) == ["sad", "odd"]
    rows = []
    for row in rows_of(content, "emotion", "sentence"):
        rows.append([" ".join(text.split()) for text in row])
    for emotion, sentences in bank.items():
        assert len(sentences) >= 5
        assert sentences == [sentence for name, sentence in rows if name == emotion]
    assert {name for name, _ in rows} <= {*bank, *er.EMOTIONS}


CELLS = {  # mostly good
    "path": ["a.wav", "./a.wav", "deep\\b.wav", " c.wav ", 'so, "so".wav', "a\nb.wav", "1", "nan",
             "none.wav", "..", "x" * 300, ""],
    "emotion": ["happy", "HAPPY", " sad", "so  so", "nancy", "1", "\u0130"] * 4 + ["clip", "", "\0"],
    "speaker": ["1", "2", "02", "10", "nan", "Ann  B", "\u0663", "9" * 20] * 2 + [""],
    "split": ["train", "Test", " validation"] * 6 + ["dev", ""],
    "transcript": ["So it is, yes.", "So\nit is", "nan", ""],
    "": ["", "1"],
}
CELL = {name: st.sampled_from(cells) for name, cells in CELLS.items()}
LINE = st.fixed_dictionaries(CELL)
LINES = st.lists(LINE, min_size=2, max_size=5, unique_by=lambda line: line["path"])
OPTIONAL = st.sampled_from([name for name in CELLS if name not in ("path", "emotion")])


@st.composite
def tables(draw):
    """Strategy: a CSV, perhaps damaged, with some columns of CELLS and some of their cells."""
    names = ["path", "emotion", *draw(st.lists(OPTIONAL, unique=True))]
    wrong = [names[1:], [*names, "emotion"]]
    header = draw(st.sampled_from([names] * 10 + wrong))
    header = draw(st.permutations(header))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))

    text = io.StringIO()
    writer = csv.DictWriter(text, header, extrasaction="ignore", quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(draw(LINES))
    mark = draw(st.sampled_from(["", "\ufeff"]))
    content = (mark + text.getvalue()).encode()
    return draw(st.just(content) | damaged(content))


def key_of(speaker):
    """What two spellings of a speaker have in common."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", speaker.casefold())


@anything
@given(NONSENSE | tables() | tables() | tables())
def test_anything_in_a_manifest_is_right_rows_or_a_sentence(content):
    Path("m.csv").write_bytes(content)
    try:
        clips = er.list_manifest("m.csv")
    except er.UserError as error:
        assert "m.csv" in str(error) and "\n" not in str(error)
        return
    lines = {}
    for path, *line in rows_of(content, "path", "emotion", "speaker", "split", "transcript"):
        lines[PureWindowsPath(path).as_posix()] = line
    assert sorted(clips["clip"]) == sorted(lines)
    assert set(clips["reason"]) == {""}
    for clip in clips.astype(str).to_dict("records"):
        emotion, speaker, split, transcript = lines[clip["clip"]]
        assert clip["path"] == clip["clip"]
        assert key_of(clip["actor"]) == key_of(" ".join(speaker.split()).replace("nan", ""))
        assert clip["emotion"] == " ".join(emotion.lower().split())
        assert clip.get("split", "") == split.lower().replace("dev", "validation")
        assert clip.get("transcript", "") == " ".join(transcript.split())


@pytest.fixture(scope="session")
def small_results(demo, corpus, tmp_path_factory):
    """The three tables that a run of TextRNN leaves, in a folder of their own."""
    folder = tmp_path_factory.mktemp("results")
    clips = Path(corpus.clips["path"][0]).parents[1]
    command = ["--ravdess-path", str(clips), "--output-dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        er.main([*command, "--phase", "unimodal", "--run-models", "rnn", *TINY])
    return folder


RESULTS = ["config.json", "predictions.csv", "histories.csv"]


@settings(parent=anything, max_examples=anything.max_examples // 4)
@given(data=st.data(), name=st.sampled_from(RESULTS))
def test_anything_in_the_files_of_a_report_is_a_report_or_a_sentence(data, name, small_results):
    for path in map(small_results.joinpath, RESULTS):
        shutil.copy(path, ".")
    content = Path(name).read_bytes()
    Path(name).write_bytes(data.draw(damaged(content)))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        with contextlib.suppress(er.UserError):
            er.main(["--phase", "report", "--output-dir", "."])


# %% The real corpus
@pytest.mark.skipif(not REAL, reason="set RAVDESS_PATH to the folder of the real corpus")
def test_the_real_corpus_is_complete_and_its_quiet_clips_survive(unpublished):
    command = ["--ravdess-path", str(START / REAL), "--device", "cpu"]
    er.main([*command, "--phase", "data", "--run-models", "rnn"])
    audit, clips = read_json("outputs/audit.json")["audit"], pd.read_csv("outputs/clips.csv")
    assert len(clips) == 1440 and len(pd.read_csv("outputs/left_out.csv")) == 0
    assert "1440 clips of 24 actors are used; left out: none" in audit[0]
    assert "Missing from the 1440 clips of RAVDESS: 0." in audit
    by_emotion = ", ".join(f"{emotion} 192" for emotion in er.EMOTIONS[1:])
    assert f"Clips per emotion: neutral 96, {by_emotion}." in audit
    assert any(sentence.startswith("Same bytes under several names: ") for sentence in audit)

    paths = clips["path"][clips["actor"].isin([9, 20])]
    peaks = [np.abs(soundfile.read(path)[0]).max() for path in paths]
    assert sum(peak < 300 / 32768 for peak in peaks) >= 10
    cfg = config()
    for path in paths:
        assert len(er.load_clip(path, cfg).mel) > 40  # 0.65 s


# %% Speed
@pytest.fixture
def all_cores():
    """Speed is measured as a user has it: with a thread for every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


def seconds_of(*functions):
    """The median times of functions that take turns 15 times, since machines have slow minutes."""
    times = []
    for function in functions * 15:
        time.sleep(0.2)  # threads of the one before may still be waiting for work
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    table = np.reshape(times, (15, len(functions)))
    return np.median(table, axis=0).tolist()


def recordings(count=64):
    """Files like RAVDESS's: 48 kHz, 3.7 s, of which 1.9 s are speech."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        voice = er.synthesize(er.EMOTIONS[number % 8], number, rng, 48000)
        clip = np.pad(np.resize(voice, 91200), (48000, 38400))
        paths.append(written(f"{number}.wav", clip, 48000))
    return paths


@pytest.mark.benchmark
def test_features_and_digests_take_a_quarter_of_the_time_of_librosa(all_cores):
    import librosa
    cfg, paths = config(), recordings()

    def with_librosa():
        for path in paths:
            samples, rate = librosa.load(path, sr=RATE)
            librosa.feature.melspectrogram(y=samples, sr=rate)

    def with_product():
        er.in_parallel(lambda path: er.load_clip(path, cfg), paths)

    ours, theirs = seconds_of(with_product, with_librosa)
    print(f"\nfeatures: {1000 * ours / len(paths):.2f} ms a clip, librosa's loop "
          f"{1000 * theirs / len(paths):.2f} ms: {theirs / ours:.1f} times as fast")
    assert ours <= theirs / 4


@pytest.mark.benchmark
@pytest.mark.skipif("WHISPER_PATH" not in os.environ, reason="WHISPER_PATH names no Whisper base")
def test_whispers_encoder_hears_ten_times_faster_than_real_time(all_cores):
    cfg = config(phase="predict")
    encoder = encoder_of("--whisper-model", os.environ["WHISPER_PATH"])
    samples = np.resize(speech(), int(2.5 * RATE))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds, = seconds_of(lambda: er.speech_features(samples, (1.0, ""), encoder, cfg, "cpu"))
        faster = 2.5 / seconds
        print(f"\n{threads} threads: {1 / seconds:.0f} clips of 2.5 s a second, {faster:.0f} times real time")
        assert faster > 10


class OneByOne(torch.utils.data.Dataset):
    """What a student writes: clip by clip, the same network in float32, no augmentation."""

    def __init__(self, clips, read):
        self.clips, self.read = clips, read

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, row):
        mel = torch.from_numpy(self.read(row)[:, :160])
        mel = F.pad(mel, (0, 160 - mel.shape[1]))
        return mel[None], er.EMOTIONS.index(self.clips["emotion"][row])


def plain_loop(network, clips, read, batch_size):
    """A function that trains for an epoch as tutorials do."""
    network.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(network.parameters())
    loader = torch.utils.data.DataLoader(OneByOne(clips, read), batch_size, shuffle=True)

    def loop():
        for mel, label in loader:
            optimizer.zero_grad()
            F.cross_entropy(network({"mel": mel}), label).backward()
            optimizer.step()

    return loop


@pytest.mark.benchmark
def test_training_is_several_times_as_fast_as_a_plain_loop(demo, all_cores):
    import copy

    import librosa
    cfg, paths = demo[0], recordings()
    clips = demo[1][:64].reset_index(drop=True)
    mels = [er.load_clip(path, cfg).mel for path in paths]
    clips["mel"] = pd.Series(mels)
    network = er.AudioCNN(classes=8, dropout=cfg.dropout).train()
    plain, in_memory = copy.deepcopy(network), copy.deepcopy(network)
    network.to(memory_format=torch.channels_last)
    trainer = er.Trainer(network, cfg, 1000, "cpu")
    dataset = er.ClipDataset(clips, network, cfg, "cpu", augment=True)

    def with_product():
        for batch in er.batches_of(dataset, cfg.batch_size, "product", shuffle=True):
            trainer.step(batch)

    def from_file(row):
        samples, rate = librosa.load(paths[row], sr=RATE)
        mel = librosa.feature.melspectrogram(
            y=samples, sr=rate, n_fft=cfg.n_fft, hop_length=cfg.hop_length, n_mels=cfg.n_mels)
        return np.log(mel + 1e-6)

    def prepared(row):
        return np.array(clips["mel"][row], dtype=np.float32).T

    plain = plain_loop(plain, clips, from_file, cfg.batch_size)
    in_memory = plain_loop(in_memory, clips, prepared, cfg.batch_size)
    seconds = seconds_of(with_product, plain, in_memory)
    ours, theirs, cached = len(clips) / np.array(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\ntraining: {ours:.0f} augmented clips a second; plain float32 loop {theirs:.0f}: "
          f"{ours / theirs:.1f} times as fast; the same on prepared features {cached:.0f}: "
          f"{ours / cached:.1f} times; peak memory {peak:.2f} GB")
    assert ours >= 3 * theirs and peak < 2


@contextlib.contextmanager
def busy_machine(processes):
    """Other programs that want all of the processor."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds_an_epoch(first=""):
    """How long an epoch of the demo's AudioCNN takes in a process of its own, after a first line of code."""
    argv = [str(SCRIPT), *"--demo --run-models cnn --epochs-cnn 1".split()]
    code = f"{first}\nimport runpy, sys\nsys.argv = {argv}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    shutil.rmtree(OUTPUT, ignore_errors=True)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    return pd.read_csv(OUTPUT / "histories.csv")["seconds"].iloc[-1]


@pytest.mark.benchmark
def test_beside_other_programs_training_is_not_many_times_as_slow():
    print("\nseconds an epoch of the demo's AudioCNN, threads that sleep / OpenMP's own way of waiting:")
    for processes in (0, os.cpu_count()):
        with busy_machine(processes):
            # Loaded before the script can say how threads wait, OpenMP has its own way.
            ours, default = seconds_an_epoch(), seconds_an_epoch("import torch")
        print(f"  beside {processes} busy processes: {ours:.1f} / {default:.1f}")
    assert ours <= default / 2
