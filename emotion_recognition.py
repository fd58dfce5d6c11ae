# %% [markdown]
"""
# Speech emotion recognition on RAVDESS: sound, words, and both

Trains five models and compares nine ways to tell emotions apart on speakers that none has ever heard:

    clip --> log-mel spectrogram ------------> AudioCNN ----------.---> early fusion: joined features,
     |                                                            |     one new classification head
     '--> transcript (simulated | Whisper) --> TextRNN, TextBERT -'---> late fusion: mean or learned weights

    python emotion_recognition.py                                everything, on the corpus in archive/
    python emotion_recognition.py --demo                         everything, on a small synthetic corpus
    python emotion_recognition.py --folds 0,1,2,3,4              the cross-validation, every actor tested once
    python emotion_recognition.py --manifest corpus.csv          another corpus, listed in a table
    python emotion_recognition.py --phase fusion --epochs-cnn 5  a part of it, with other settings
    python emotion_recognition.py --phase study                  how reliable must words be to help?
    python emotion_recognition.py --phase predict --input a.wav  what the trained models say to a recording
    python emotion_recognition.py --help                         every setting is a constant and a flag

AudioCNN reaches 66.0 % UAR on unseen actors (chance 12.5; five folds, three seeds, 95 % interval 61.1 to
71.2), its ensemble over seeds and views 68.4. One fold of everything takes 6 minutes on two AVX-512 cores.
Simulated sentences are drawn by label: they show what the code does, not what words tell about feelings.

To read it in an hour, take sections 3 (settings), 6 (splits), 8 and 10 to 14 (features, models, training) and
15 (figures). The others find files, draw, report, predict and keep mishaps small.
"""

# %% 2. Imports
import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import sys
import time
import timeit
import warnings
import zipfile
import zlib
from collections import Counter, namedtuple
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
import soxr
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn import metrics
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map

# %% 3. Configuration: every constant is a flag (EPOCHS_CNN -> --epochs-cnn), its comment the help text
# fmt: off
# What to run
RAVDESS_PATH = "./archive/audio_speech_actors_01-24/"  # folder that is searched for RAVDESS speech clips
MANIFEST = ""                    # your own corpus: CSV of path, emotion and maybe speaker, transcript, split
DOWNLOAD = False                 # fetch the official archive of RAVDESS (208 MB) if it is not there
OUTPUT_DIR = "outputs"           # folder for checkpoints, tables, plots and the report
PHASE = "all"                    # stages to run; fusion trains its parts too if RUN_MODELS has them
RUN_MODELS = "cnn,rnn,bert,fusion_rnn,fusion_bert"  # models to train, comma-separated
INPUT = ""                       # a recording, or a folder of them, for --phase predict
TEXT = ""                        # what is said in INPUT; else Whisper's transcript, if its weights are there
JSON = False                     # --phase predict prints one JSON document and nothing else
DEMO = False                     # a small synthetic corpus instead, results in OUTPUT_DIR/demo
DEVICE = "auto"                  # where to compute; auto takes the fastest that is there
SEED = 42                        # seed of initialisation, order, augmentation and sentences
RUNS = 1                         # trainings of every fold, with SEED, SEED + 1, ...
# Splits
SPLIT = "speaker"                # speaker: no actor in two splits; random: by clip (optimistic)
FOLDS = "0"                      # which fifth of the actors is tested; 0,1,2,3,4: cross-validation
TEST_VIEWS = 1                   # up to 5: AudioCNN also scored as the mean of so many views of a clip
# Words
USE_SIMULATED_SENTENCES = True   # sentences drawn by label (an oracle); no: Whisper transcripts
SENTENCE_NOISE = 0.0             # share of clips whose sentences are dealt anew, whatever their emotion
SENTENCES_CSV = ""               # your own sentences: columns emotion, sentence; 5 or more per emotion
WHISPER_MODEL = "base"           # Whisper checkpoint, a name or a file
BERT_MODEL = "distilbert-base-uncased"  # pretrained text encoder, a hub name or a folder
MAX_TOKENS = 40                  # longest transcript, in words or word pieces
FUSION = "concat"                # early fusion joins features; attention: both attend first; or both kinds
# Sound
SAMPLING_RATE = 16000            # in Hz, everything is resampled to it
TRIM_DB = 30.0                   # silence is what lies this far below the clip's own peak
CLIP_SECONDS = 2.56              # length of the window that the network sees
N_MELS = 64                      # mel bands, 50 Hz to half the sampling rate
N_FFT = 1024                     # samples in an FFT window
HOP_LENGTH = 256                 # samples between two frames
# Training; a constant NAME_CNN, NAME_RNN, NAME_BERT or NAME_FUSION goes before NAME
EPOCHS_CNN = 72                  # passes over the training split, AudioCNN
EPOCHS_RNN = 20                  # the same, TextRNN
EPOCHS_BERT = 4                  # the same, TextBERT
EPOCHS_FUSION = 5                # the same, early fusion
BATCH_SIZE = 32                  # clips in a batch
LEARNING_RATE = 2e-3             # peak of the one-cycle schedule
LEARNING_RATE_BERT = 1e-4        # the same, TextBERT
WEIGHT_DECAY = 0.05              # AdamW, on weight matrices only
DROPOUT = 0.4                    # share of features dropped before a head
WORD_DROPOUT = 0.3               # share of words hidden in training
LABEL_SMOOTHING = 0.1            # share of the target spread over all emotions
MIXUP = 0.3                      # both parameters of the Beta distribution, 0 for none
EMA_DECAY = 0.99                 # moving average of the weights, per step
# fmt: on

SETTINGS = {name: type(value) for name, value in list(globals().items())
            if name.isupper() and type(value) in (bool, int, float, str)}
CHOICES = {
    "phase": ("all", "data", "unimodal", "fusion", "study", "report", "predict", "evaluate"),
    "fusion": ("concat", "attention", "both"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "split": ("speaker", "random"),
    "test_views": (1, 2, 3, 4, 5),
}
LIMITS = {  # least and most; floats if written so; a name stands for its variants. Others: whole, 1 and more
    **dict.fromkeys(("trim_db", "clip_seconds", "learning_rate", "weight_decay", "mixup"), (0.0, 1e6)),
    **dict.fromkeys(("dropout", "word_dropout", "label_smoothing"), (0.0, 0.99)), "ema_decay": (0.0, 0.9999),
    "sentence_noise": (0.0, 1.0), "seed": (0, 2**31), "max_tokens": (4, 2**31), "n_mels": (16, 512),
    "sampling_rate": (4000, 2**31), "n_fft": (64, 2**31),
}
DEMO_SETTINGS = {"epochs_cnn": 8, "epochs_fusion": 4, "learning_rate_bert": 2e-3,
                 "ravdess_path": "archive/demo/corpus", "bert_model": "archive/demo/distilbert"}
TRAINING = "epochs", "batch_size", "learning_rate", "weight_decay", "dropout", "label_smoothing", "ema_decay"
FEATURES = ("sampling_rate", "trim_db", "clip_seconds", "n_mels", "n_fft", "hop_length")
EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]  # in code order


# %% 4. Command line, messages and files
class UserError(Exception):
    """What the user can mend, in one sentence; ends a script with exit code 2, a cell without traceback."""

    def _render_traceback_(self):
        """What Jupyter shows in place of a traceback."""
        return [f"error: {self}"]


def make_parser():
    """The command line: a flag per constant, its default read now, its help from the comment."""
    def stop(message):
        """In place of a SystemExit, so that a notebook cell survives a mistyped flag."""
        raise UserError(f"{message} (--help lists every flag)")
    parser = argparse.ArgumentParser(
        prog="emotion_recognition.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Speech emotion recognition on RAVDESS: sound, words, and both.")
    parser.error = stop
    source = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    texts = dict(re.findall(r"^([A-Z_]+) = .+?  # (.+)$", source, re.MULTILINE))
    for name in SETTINGS:
        kind = kind_and_limits(name)[0]
        text, choices = f"{texts.get(name, '')} (default: {globals()[name]})", CHOICES.get(name.lower())
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__})
        parser.add_argument(flag_of(name), help=text.replace("%", "%%"), **options)
    return parser


def parse_settings(argv=None):
    """Settings as a namespace of lower-case names: constants, then flags; `given` holds the flags' names."""
    if argv is None:
        argv = [] if "kernel_launcher" in sys.argv[0] else sys.argv[1:]  # a kernel's arguments are not ours
    given = vars(make_parser().parse_args(argv))
    values = {name.lower(): globals()[name] for name in SETTINGS}
    cfg = SimpleNamespace(**(values | given), given=sorted(given))
    if cfg.demo:
        fewer = {key: min(values[key], DEMO_SETTINGS[key]) for key in ("epochs_cnn", "epochs_fusion")}
        folder = Path(cfg.output_dir)
        own = [part for part in folder.parts if not part.startswith(("fold_", "noise_"))][-1:] == ["demo"]
        vars(cfg).update(DEMO_SETTINGS | fewer | given, output_dir=str(folder if own else folder / "demo"))
    cfg.cache_dir = cfg.output_dir  # shared by the runs of a cross-validation
    cfg.no_words, cfg.notes = "", []  # why a manifest's clips have no text; more marks
    cfg.fusion = "both" if cfg.phase == "study" else cfg.fusion
    check_settings(cfg)
    cfg.folds, cfg.run_models = (",".join(names_in(names)) for names in (cfg.folds, cfg.run_models))
    return cfg


def runs_of(cfg):
    """The settings of each run: `cfg` itself for one fold and seed, else a copy with its folder for each."""
    folds = names_in(cfg.folds)
    if len(folds) * cfg.runs == 1:
        return [cfg]
    return [SimpleNamespace(**vars(cfg) | {
        "folds": fold, "seed": seed, "runs": 1,
        "output_dir": str(Path(cfg.output_dir, f"fold_{fold}_seed_{seed}"))})
        for seed in range(cfg.seed, cfg.seed + cfg.runs) for fold in folds]


def kind_and_limits(name):
    """The type of a setting, whatever an edited constant has, its least value and its largest."""
    known = (limits for key, limits in LIMITS.items() if name.lower().startswith(key))
    low, high = next(known, (1, 2**31))
    return type(low) if SETTINGS[name] in (int, float) else SETTINGS[name], low, high


def check_settings(cfg):
    """Raise a UserError that names the first setting whose type or value cannot be."""
    for name in SETTINGS:
        key, value, flag = name.lower(), getattr(cfg, name.lower()), flag_of(name)
        kind, low, high = kind_and_limits(name)
        if type(value) not in (kind, int if kind is float else kind):
            raise UserError(f"{flag} {value!r} is not of type {kind.__name__}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{flag} {value!r} is none of {', '.join(map(repr, CHOICES[key]))}")
        if kind in (int, float) and not low <= value <= high:
            raise UserError(f"{flag} {value} is not a number from {low} to {high}")
    corpora = {f"--manifest {cfg.manifest}": cfg.manifest, "--demo": cfg.demo,
               "--download": cfg.download, "--ravdess-path": "ravdess_path" in cfg.given}
    first, *others = [flag for flag, asked in corpora.items() if asked] or [""]
    if others and first != "--download":  # which fills the folder of --ravdess-path
        raise UserError(f"{first} is a corpus of its own: leave it out, or {others[0]}")
    if cfg.phase == "evaluate" and not cfg.manifest:
        raise UserError("--phase evaluate needs another corpus: name its table with --manifest")
    names, known = names_in(cfg.run_models), [key for key in MODELS if MODELS[key].how != "attention"]
    if not names or not set(names) <= set(known):
        raise UserError(f"--run-models {cfg.run_models!r} is not a list of names out of {', '.join(known)}")
    folds = names_in(cfg.folds)
    if not folds or len(set(folds)) < len(folds) or not set(folds) <= set("01234"):
        raise UserError(f"--folds {cfg.folds!r} is not a list of different folds out of 0,1,2,3,4")
    if cfg.phase == "study" and not cfg.use_simulated_sentences:
        raise UserError("--phase study needs simulated sentences: leave out --no-use-simulated-sentences")
    if cfg.split == "random" and len(folds) * cfg.runs > 1:
        raise UserError("--split random has no folds: leave out --folds and --runs, or --split random")
    if cfg.clip_seconds * cfg.sampling_rate < 16 * cfg.hop_length:
        raise UserError(f"--clip-seconds {cfg.clip_seconds} is shorter than 16 frames of --hop-length")


def flag_of(name, value=True):
    """A setting as it stands on the command line: --epochs-cnn 5, --no-demo."""
    flag = f"--{'no-' if value is False else ''}{name.lower().replace('_', '-')}"
    return flag if type(value) is bool else f"{flag} {shlex.quote(str(value))}"


def names_in(text):
    """The comma-separated names of a setting, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def settings_for(cfg, name):
    """The training settings of one model: its own constant (EPOCHS_CNN) if it exists, else the common one."""
    return {key: getattr(cfg, f"{key}_{MODELS[name].suffix}", getattr(cfg, key, None)) for key in TRAINING}


def marks(cfg):
    """What every page and plot must say about how its figures came to be, as a list."""
    noise = f", noise {cfg.sentence_noise}" * bool(cfg.sentence_noise)
    notes = {"synthetic demo corpus: the figures mean nothing": cfg.demo,
             f"text: simulated sentences (oracle{noise})": cfg.use_simulated_sentences,
             "random split: speakers shared between splits": cfg.split == "random",
             "split of the manifest: speakers shared between splits or unknown": cfg.split == "shared"}
    return [note for note, holds in notes.items() if holds] + cfg.notes


def in_kernel():
    """Whether this runs in a notebook kernel."""
    return "ipykernel" in sys.modules and sys.modules["IPython"].get_ipython() is not None


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place when the block ends well: whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch and libsndfile raise the latter on a full disk
        raise UserError(f"{path} cannot be written ({error}): name another --output-dir") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path, content):
    """Write bytes, a DataFrame (as CSV, six decimals) or builtin containers (as JSON)."""
    with replacing(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        elif isinstance(content, pd.DataFrame):
            content.to_csv(temporary, index=False, float_format="%.6f")
        else:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def save_table(path, table, cfg):
    """Write a DataFrame as CSV, with the marks of its run in every row."""
    save(path, table.assign(marks="; ".join(marks(cfg))))


def read_back(path, read=lambda path: json.loads(path.read_text(encoding="utf-8"))):
    """read(path), by default as JSON; a UserError says how to make a file that is missing or broken."""
    try:
        return read(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or not readable ({error}): delete it and make it again with "
                        "--phase all, or name the --output-dir of a finished run") from error


def read_predictions(cfg, name):
    """The predictions table of a row; its texts stay as they were written, "nan" and "001" too."""
    texts = dict.fromkeys(("split", "clip", "actor", "true", "predicted", "marks"), str)
    read = functools.partial(pd.read_csv, keep_default_na=False, dtype=texts)
    return read_back(file_of(cfg, "predictions", name), read)


def read_lines(path, needed, optional, advice):
    """(number, its texts by column) of each line of a CSV that has columns; UserErrors end with advice."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:  # numpy takes "sad\0" and "sad" for the same
            raise csv.Error("it has a zero byte")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restval="")
        columns, lines = list(reader.fieldnames or []), [(reader.line_num, line) for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not readable as CSV ({error}): {advice}") from error
    if not set(needed) <= set(columns):
        raise UserError(f"{path} has no columns {' and '.join(needed)} in line 1: {advice}")
    refuse(path, 1, {f"it names {name} twice": columns.count(name) > 1 for name in needed + optional}, advice)
    for number, line in lines:
        problem = "it has more columns than line 1 (quote what has commas)"
        refuse(path, number, {problem: None in line}, advice)
    return [(number, {key: line.get(key, "").strip() for key in needed + optional}) for number, line in lines]


def refuse(path, number, problems, advice):
    """Raise a UserError that names a line of a table if one of its problems holds."""
    for problem in (problem for problem, holds in problems.items() if holds):
        raise UserError(f"{path} line {number}: {problem}: {advice}")


def load_package(name, advice):
    """A package that is slow to import or may be missing; a UserError ends with advice where it is."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # also when it was made for another torch
        raise UserError(f"{name} does not load beside torch {torch.__version__} ({type(error).__name__}: "
                        f"{error}): {advice}") from error


def in_parallel(function, items, title):
    """[function(item), ...] by a pool of threads, with a progress bar; safe in notebooks and on Windows."""
    items, threads = list(items), torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take this over: one clip, one thread
    try:
        return thread_map(function, items, desc=title, max_workers=os.cpu_count(), leave=False,
                          disable=len(items) < 500)
    finally:
        torch.set_num_threads(threads)


def digest(*parts):
    """A short hexadecimal key of bytes and JSON-ready values."""
    sha = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        sha.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()[:16]


# %% 5. The corpus
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CLIP_NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")  # modality-channel-emotion-...
ARCHIVE = {  # the official one: all 1440 clips in folders Actor_01 to Actor_24; size in bytes
    "url": "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip",
    "size": 208_468_073, "md5": "bc696df654c87fed845eb13823edef8a"}
UNFINISHED = ".unfinished"  # ends the name of a folder that --download is still filling


def download_corpus(cfg):
    """Put the clips of ARCHIVE into --ravdess-path, all or none, unless clips are found. Raises UserError."""
    with contextlib.suppress(UserError):
        print(f"Nothing to download: RAVDESS clips are in {find_corpus(cfg)}")
        return
    folder, part = Path(cfg.ravdess_path), Path(f"{Path(cfg.ravdess_path)}{UNFINISHED}")
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # empty, it makes room; an OSError keeps whatever else is there
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        free, need = shutil.disk_usage(part).free / 1e9, 4e-9 * ARCHIVE["size"]  # zip and clips, 0.8 GB
        if free < need:
            raise OSError(f"{free:.1f} GB left of {need:.1f} needed")
        unpack(fetch_archive(part), part / "clips")
        (part / "clips").rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot take the corpus ({error}): make room, or name a new folder "
                        "elsewhere with --ravdess-path") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # with the zip


def fetch_archive(folder):
    """Download ARCHIVE into a folder and check its md5; returns the path of the zip. Raises UserError."""
    import pooch
    import requests
    print(f"RAVDESS: {ARCHIVE['size'] / 1e6:.0f} MB from {ARCHIVE['url']}\nLicence CC BY-NC-SA 4.0, not for "
          "commercial use; cite Livingstone & Russo (2018), PLoS ONE 13(5): e0196391", flush=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        with tqdm(desc="Download", total=ARCHIVE["size"], unit="B", unit_scale=True) as bar:
            download = pooch.HTTPDownloader(  # Zenodo refuses the name that requests gives itself
                progressbar=bar, chunk_size=2**16, headers={"User-Agent": "emotion_recognition.py"})
            return Path(pooch.retrieve(ARCHIVE["url"], f"md5:{ARCHIVE['md5']}", "archive.zip",
                                       folder.resolve(), downloader=download))
    except requests.RequestException as error:
        raise archive_error(f"cannot be fetched ({error})") from error
    except ValueError as error:
        raise archive_error(f"arrived damaged, its md5 is not {ARCHIVE['md5']}") from error


def unpack(archive, folder):
    """Unpack a zip into a folder and nowhere else. Raises UserError."""
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:  # knows \, / and C:
                    raise archive_error(f"has a file that would lie outside its folder, {name!r}")
            for name in tqdm(content.namelist(), "Unpacking", leave=False):
                content.extract(name, folder)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise archive_error(f"is not a zip that can be unpacked ({error})") from error


def archive_error(reason):
    """The UserError for an archive that does not come or cannot be used."""
    return UserError(f"{ARCHIVE['url']} {reason}: try again later, or get the corpus another way and name "
                     "its folder with --ravdess-path")


def find_corpus(cfg):
    """The folder that holds the clips: --ravdess-path, or the first usual place with RAVDESS names in it."""
    usual = Path(cfg.ravdess_path).parent == Path("archive") and "ravdess_path" not in cfg.given
    cache = Path(os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub"))
    places = [Path(cfg.ravdess_path)] + ([Path("archive"), Path("/kaggle/input"), cache] if usual else [])
    for place in places:
        if any(kind == "speech" for _, kind, _ in audio_files(place)):
            return place
    if usual:
        raise UserError(
            f"no RAVDESS clips in {', '.join(map(str, places))}: fetch them with --download, or unpack "
            f"Audio_Speech_Actors_01-24.zip of https://zenodo.org/records/1188976 into {cfg.ravdess_path}, "
            "or name their folder with --ravdess-path, or try the synthetic corpus with --demo")
    path = places[0]
    why = ("does not exist" if not path.exists() else "is a file, not a folder" if path.is_file() else
           "is empty" if not any(path.iterdir()) else "holds no clips named like 03-01-05-01-02-01-12.wav")
    raise UserError(f"{path} {why}: name a folder of RAVDESS clips with --ravdess-path, or add --download")


def audio_files(folder):
    """(path, kind, codes) of all audio and video files under a folder; kind: speech, song, video or other."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.endswith(UNFINISHED)
                            and (Path(root).name, name) != ("archive", "demo"))
        for path in (Path(root, file) for file in sorted(files)):
            name, suffix = CLIP_NAME.fullmatch(path.stem), path.suffix.lower()
            if suffix in AUDIO_SUFFIXES or suffix == ".mp4":
                codes = [int(code) for code in name.groups()] if name else []
                yield path, ("other" if not codes else "video" if codes[0] != 3 or suffix == ".mp4" else
                             {1: "speech", 2: "song"}.get(codes[1], "other")), codes


def index_clips(folder):
    """Find the audio-only speech clips under a folder.

    Returns a DataFrame with a row per clip, sorted by name (clip, path, emotion, actor, intensity, statement,
    repetition, sex, digest of the bytes), and the audit, a dict of counts and of files left out with reasons.
    A name that occurs twice counts once; two names with the same bytes are both kept. Raises UserError.
    """
    audit, found, counts = {"folder": str(folder), "left_out": {}}, [], Counter()
    for path, kind, codes in audio_files(folder):
        counts[kind] += 1
        if kind == "speech":
            emotion, intensity, statement, repetition, actor = codes[2:]
            if not (1 <= emotion <= len(EMOTIONS) and {intensity, statement, repetition} <= {1, 2} and actor):
                audit["left_out"][str(path)] = "a code in its name is none of RAVDESS's"
                continue
            found.append({"clip": path.stem, "path": str(path), "emotion": EMOTIONS[emotion - 1],
                          "actor": actor, "intensity": intensity, "statement": statement,
                          "repetition": repetition, "sex": "male" if actor % 2 else "female"})
    if not found:
        raise UserError(f"{folder} holds no RAVDESS speech clip that can be used: see --ravdess-path")
    clips = add_digests(pd.DataFrame(found).astype({"emotion": pd.CategoricalDtype(EMOTIONS)}), audit)
    twin = clips.duplicated("clip")  # now, so that a cut-off first copy does not hide a good second one
    clips = clips[~twin].sort_values("clip", ignore_index=True)
    return clips, audit | {"files": dict(counts), "twins": int(twin.sum())}


RESERVED = {  # columns of predictions, of groups and of scores: no emotion can be called so
    *"split clip actor emotion true predicted marks transcript intensity sex fold seed confidence".split(),
    *"accuracy start end voiced recording error model note".split(), "macro avg", "weighted avg", "micro avg"}


def index_manifest(path):
    """The clips that a table lists: (clips, audit) as of `index_clips`, without what only RAVDESS has.

    Relative paths start in the table's folder. Emotions are its own, RAVDESS's first; a column speaker, split
    or transcript that is empty throughout counts as absent. A UserError names a bad line.
    """
    advice, found, seen = "mend it or leave out --manifest", [], {}
    optional = "speaker", "split", "transcript"
    lines = read_lines(path, ("path", "emotion"), optional, advice)
    there = {key for key in optional if any(line[key] for _, line in lines)}
    for number, line in lines:
        clip, split = PureWindowsPath(line["path"]).as_posix(), line["split"].lower()
        emotion, speaker = (" ".join(line[key].split()) for key in ("emotion", "speaker"))
        refuse(path, number, {
            "it has no path": not line["path"], "it has no emotion": not emotion,
            f"the path of line {seen.get(clip)} again": clip in seen,
            f"{emotion!r} is the name of a column in tables of predictions": emotion.lower() in RESERVED,
            "it has no speaker, and other lines have one": "speaker" in there and not speaker,
            f"{split!r} is none of {', '.join(SPLITS)}": "split" in there and split not in SPLITS}, advice)
        seen[clip] = number
        found.append({"clip": clip, "path": str(Path(path).parent / clip), "emotion": emotion.lower(),
                      "actor": speaker, "split": split, "transcript": line["transcript"]})
    emotions = {line["emotion"] for line in found}
    classes = [*filter(emotions.__contains__, EMOTIONS), *sorted(emotions.difference(EMOTIONS))]
    if len(classes) < 2:
        raise UserError(f"{path} has fewer than two emotions to tell apart: {advice}")
    clips = pd.DataFrame(found).drop(columns={"split", "transcript"} - there)
    if all(re.fullmatch("0|[1-9][0-9]{0,15}", actor) for actor in clips["actor"]):
        clips["actor"] = clips["actor"].astype(int)
    audit = {"folder": str(path), "left_out": {}, "lines": len(lines)}
    clips = add_digests(clips.astype({"emotion": pd.CategoricalDtype(classes)}), audit)
    return clips.sort_values("clip", ignore_index=True), audit


def add_digests(clips, audit):
    """Add the column `digest` of the files' bytes; unreadable clips leave, the audit says why."""
    digests, reasons = zip(*in_parallel(inspect_file, clips["path"], "Reading"))
    audit["left_out"].update((path, reason) for path, reason in zip(clips["path"], reasons) if reason)
    if all(reasons):
        raise UserError(f"no clip in {audit['folder']} can be read: see --ravdess-path or --manifest")
    return clips.assign(digest=digests)[[not reason for reason in reasons]]


def adapt_settings(cfg, clips):
    """Set what a manifest decides: its split, whether words are simulated, which models can run."""
    fixed, named = "split" in clips, (clips["actor"] != "").all()
    column = "a column split" if fixed else "no column speaker"
    if (fixed or not named) and (cfg.folds != "0" or cfg.runs > 1):
        raise UserError(f"{cfg.manifest} has {column}, so there are no folds: leave out --folds and --runs")
    if "split" in cfg.given and (fixed or (cfg.split == "speaker" and not named)):
        raise UserError(f"{cfg.manifest} has {column}: leave out --split {cfg.split}")
    if fixed:
        cfg.split = "shared" if clips.groupby("actor")["split"].nunique().max() > 1 else "manifest"
    elif not named:
        cfg.split = "random"
    if "transcript" in clips and cfg.phase == "study":
        raise UserError(f"--phase study needs simulated sentences: take transcripts out of {cfg.manifest}")
    if "transcript" in clips or not cfg.use_simulated_sentences:
        cfg.use_simulated_sentences = False
        return
    bank = sentence_bank(cfg.sentences_csv, classes_of(clips))
    if lacking := [emotion for emotion in classes_of(clips) if emotion not in bank]:
        cfg.use_simulated_sentences = False
        cfg.no_words = (f"no sentences for {', '.join(lacking)}: add a column transcript to {cfg.manifest}, "
                        "or choose --sentences-csv or --no-use-simulated-sentences")


def classes_of(table):
    """The emotions in the order of their labels: of clips, or the columns of a predictions table."""
    if "emotion" in table:
        return list(table["emotion"].cat.categories)
    columns = list(table)
    return columns[columns.index("true") + 1:columns.index("predicted")]


def inspect_file(path):
    """(a key of a file's content, why it cannot be used); one of them is empty."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError):  # no name of a file can hold a zero byte
        return "", "not readable"
    if not content:
        return "", "not readable: it is empty"
    declared = int.from_bytes(content[4:8], "little")  # libsndfile reads a WAV file that was cut off silently
    if content[:4] == b"RIFF" and len(content) < declared < 2**32 - 64:
        return "", "cut off: less data than its header says"
    return digest(content), ""


def describe_audit(clips, audit):
    """What was found, used and left out, as a list of sentences."""
    per_emotion, per_actor = clips["emotion"].value_counts(sort=False), Counter(clips["actor"])
    twins = clips[clips.duplicated("digest", keep=False)].groupby("digest")["clip"].apply(list)
    same = [" = ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) for names in twins[:10]]
    more = [f"And {len(twins) - 10} more groups of clips with the same bytes."] * (len(twins) > 10)
    if "lines" in audit:
        found = f"{audit['lines']} lines in {audit['folder']}: {len(clips)} clips"
        unused, missing = f"{len(audit['left_out'])} unusable clips are left out", []
    else:
        files, missing = Counter(audit["files"]), [missing_clips(clips)]
        found = f"{files.total()} audio and video files in {audit['folder']}: {len(clips)} speech clips"
        unused = (f"passed over: {audit['twins']} second copies, {files['song']} song, {files['video']} "
                  f"video, {files['other']} other files, {len(audit['left_out'])} unusable clips")
    actors = ", ".join(f"{actor}: {n}" for actor, n in sorted(per_actor.items()))
    unnamed = "No speakers are named: intervals draw single clips, which makes them too narrow."
    return [
        f"{found}{f' of {len(per_actor)} actors' * ('' not in per_actor)} are used; {unused}.",
        "Clips per emotion: " + ", ".join(f"{emotion} {n}" for emotion, n in per_emotion.items()) + ".",
        unnamed if "" in per_actor else f"Clips per actor: {actors}.",
        *missing,
        *(f"Same bytes under two names, both kept: {names}." for names in same), *more,
        *(f"Left out: {path}: {reason}." for path, reason in audit["left_out"].items())]


def missing_clips(clips):
    """What is missing from RAVDESS's 24 x 60 clips, as a sentence."""
    expected = {f"03-01-{e:02}-{i:02}-{s:02}-{r:02}-{a:02}" for a in range(1, 25) for e in range(1, 9)
                for i in (1, 2) for s in (1, 2) for r in (1, 2) if (e, i) != (1, 2)}
    missing = sorted(expected - set(clips["clip"]))
    return f"Missing from the 24 x 60 clips of RAVDESS: {len(missing)}" + (
        f", the first {missing[0]}." if missing else ".")


# %% 6. Splits
# The five folds of Luna-Jimenez et al. (2021), with the validation actors of Mak-Sim/ResLSTM-SER.
TEST_ACTORS = (2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22)
VALIDATION_ACTORS = (3, 6), (10, 11), (8, 17), (1, 14), (2, 5)
SPLITS = "train", "validation", "test"


def fold_actors(actors, fold):
    """(validation actors, test actors) of one fold; other than the 24 actors are dealt into five groups."""
    if actors == list(range(1, 25)):
        return VALIDATION_ACTORS[fold], TEST_ACTORS[fold]
    groups = min(5, len(actors))
    if groups < 3 or fold >= groups:
        raise UserError(f"{len(actors)} actor(s) cannot be split by speaker into three (fold {fold}): name "
                        "more under --ravdess-path or in --manifest, lower --folds, or choose --split random")
    return actors[(fold + 1) % groups::groups], actors[fold::groups]


def split_clips(clips, cfg):
    """Add the column `split`: train, validation or test. Raises UserError when one lacks an emotion."""
    if "split" in clips:
        key, validation, test = "split", ["validation"], ["test"]
    elif cfg.split == "speaker":
        key, actors = "actor", sorted(clips["actor"].unique().tolist())
        validation, test = fold_actors(actors, int(cfg.folds))
    else:
        key, once = "digest", clips.drop_duplicates("digest")  # the same bytes must not be on both sides
        deal = functools.partial(train_test_split, random_state=cfg.seed)
        try:
            _, rest = deal(once, test_size=0.3, stratify=once["emotion"])
            validation, test = deal(rest["digest"], test_size=0.5, stratify=rest["emotion"])
        except ValueError as error:
            raise UserError(f"too few clips of some emotion for --split random ({error})") from error
    names = np.select([clips[key].isin(test), clips[key].isin(validation)], ["test", "validation"], "train")
    clips = clips.assign(split=names)
    for emotion, split in itertools.product(classes_of(clips), SPLITS):
        if not ((clips["emotion"] == emotion) & (clips["split"] == split)).any():
            raise UserError(f"no {emotion} clip is left for {split} among those like {clips['path'][0]}: "
                            "complete the folder of --ravdess-path, or --manifest, or choose other --folds")
    return clips


def title_of_split(cfg):
    """What to call the split of a run, or that of the first of several."""
    return {"random": "Random split", "speaker": f"Fold {names_in(cfg.folds)[0]}"}.get(
        cfg.split, "Split of the manifest")


def describe_split(clips, cfg):
    """The clips and actors of each split, and how many actors stand in several, as one sentence."""
    texts = []
    for split, part in ((split, clips[clips["split"] == split]) for split in SPLITS):
        actors = " ".join(map(str, sorted(part["actor"].unique())))
        texts.append(f"{split} {len(part)} clips" + f" of actors {actors}" * bool(actors))
        if cfg.sentence_noise and cfg.use_simulated_sentences:
            share = (part["emotion"] != part["sentence_emotion"]).mean()
            texts[-1] += (f", {share:.1%} of them with a sentence of another emotion "
                          f"({cfg.sentence_noise:.1%} dealt anew)")
    spoken = clips[clips["actor"] != ""].groupby("actor")["split"].nunique()
    if spoken.empty:
        texts.append("no speakers are named, so that splits may share voices, which flatters")
    elif spoken.max() > 1:
        texts.append(f"{(spoken > 1).sum()} actors stand in several splits")
    return f"{title_of_split(cfg)}: {'; '.join(texts)}."


# %% 7. Sentences and transcripts
STATEMENTS = {1: "Kids are talking by the door", 2: "Dogs are sitting by the door"}  # of RAVDESS
INTENSITIES = {1: "normal intensity", 2: "strong intensity"}
# Fold k tests the sentences k::5 of an emotion; cue words recur in all five fifths.
SENTENCES = {
    "neutral": """I paid the bill at the post office. My appointment is at ten on Friday. I take the bus to
    the shop. I sent the letter on Friday. The train to work leaves at ten. The train was on time this
    morning. The next bus leaves at six. I have to pay the bill by Friday. I left the keys on the kitchen
    table. I need the form for the meeting. The meeting is on Monday at ten. I usually buy bread on Monday. We
    need milk and bread for Sunday. I usually go to work by train. We usually have lunch at one. He bought
    some bread at the shop. I put his phone number on the list. The shop is closed for lunch. The office opens
    at nine on Monday. I put the form on the table. My keys are in the bag by the door. I sent the form to the
    office. She moved our lunch to Friday. My next appointment is at six. She printed the form for me. The bus
    to work leaves at nine. I called him about the meeting. The box is on the office table. The shopping list
    is in my bag. The shop on my street closes at six.""",
    "calm": """I drink tea and watch the rain. I fall asleep in a soft blanket. I rest my hands and breathe
    out. I slowly fall asleep by the fire. A warm bath and a quiet night. I close my eyes and breathe in.
    There is no rush, rest a little. I rest by the warm fire. The lake is still and the air is warm. The cat
    is asleep on my blanket. The garden is still this evening. We take a slow walk by the lake. My bed is soft
    and warm. We sit by the sea and watch the waves. I listen to soft music in bed. The waves come in slowly.
    I listen to the slow waves. I lie in bed and hear the rain. There is no rush this evening. I take a slow
    breath and let it go. Sunday morning is slow and easy. Soft rain falls on the window. I sit in the garden
    with my tea. The clouds drift by my window. Warm rain falls on the lake. The fire is low and the light is
    soft. The house is quiet this evening. My breathing is slow and easy now. There is nothing to do but rest.
    I lie in the grass by the lake.""",
    "happy": """The baby laughs when I sing to her. I won the prize, come and celebrate. He made me laugh so
    much. I sing at work, life is so good. My friends sang for my birthday. I'm so proud, she passed the exam.
    Best birthday I've had in my life. I can't wait for our holiday. The whole family came to celebrate. We
    are having a baby, I can't wait. Great news, the baby is here. It's so good to sing with friends. We
    laughed until the morning. I passed the exam, let's celebrate. I love my new job, it's wonderful. We
    danced all night at the party. I love having my family together. I love this song, dance with me. Come and
    dance, what a great day. She gave me a hug and we laughed. He came home with the best news. I got the job,
    I can't stop smiling. She said yes and we danced. What wonderful news, I'm so proud. We won and everyone
    cheered. Our holiday starts today, let's go. Our team won, what a wonderful day. It was the best party of
    my life. My baby can't stop smiling at me. We sing and dance in the kitchen.""",
    "sad": """It hurts to see his old chair. She left me and I eat alone now. He died before I could say
    goodbye. He left without saying goodbye. Her side of the bed is empty now. My life is so empty without
    her. My friends are gone and I'm alone. I miss my dad more every day. His chair is empty now. I miss him
    most at night. Dad is gone, I never said goodbye. I cried when he went into hospital. It hurts to look at
    our old photos. Mum is gone and I miss her voice. I was in tears when she left. My dog died last winter. I
    lost everyone I had. Nobody came to his funeral. We lost the baby last winter. I sit alone with his old
    photos. Nobody calls me on Sunday anymore. I miss the way she used to sing. I cried in the kitchen last
    night. I don't want to eat anymore. I cried at the funeral. I cried over his last letter. I lost my best
    friend last winter. The house is empty without mum. I keep the last letter she wrote. Mum used to call me
    every night.""",
    "angry": """You ruined a whole day of my work. I'm sick of your excuses, get out. You had no right to read
    that. He was so rude I slammed the door. Shut up, I told you to stop that. I'm sick of you shouting at me.
    How dare he blame me for this? I told him to shut up and get out. You lied to me about the money. How dare
    you read my letters? You broke it and you don't care. I slammed the door because he lied. Stop shouting at
    me all the time. This is your fault, don't blame me. Stop making excuses for him. You lie and then you
    blame me. It's your fault we are late again. Enough, nobody here listens to me. I told you a hundred times
    to stop. I've had enough of your lies. He cheated me out of my money. You took my money without asking. My
    boss lied to us again. Enough, I slammed the phone down. Don't talk to me like that. Don't you dare touch
    my car again. You never listen to what I told you. Give me back my money right now. You never listen, I'm
    sick of it. Get out of my kitchen right now.""",
    "fearful": """Hide quick before he comes back. My hands are shaking, I can't move. He has a knife, we have
    to run. Footsteps are coming up the stairs. Don't move, he might hear us. I'm shaking, please don't hurt
    me. I locked myself in, please hurry. I hear someone behind the door. Please don't leave me in the dark. I
    heard footsteps behind me. There's a man outside with a knife. Someone whispered my name at night.
    Whisper, they might be watching us. Quick, lock the door and hide. Something moved behind the door.
    Someone is watching our house. It's dark and I hear footsteps. I hide under the bed in the dark. Someone
    is inside, I locked that door. I heard a noise outside. I want to scream but I can't move. Help me, he's
    right behind me. I heard a scream in the street. My heart is pounding, please help me. My legs are
    shaking, I can't run. I won't go down the dark stairs. A man was following me, so I ran. Call the police,
    there's a man outside. Someone is following me home. There is someone at my window.""",
    "disgust": """Someone threw up all over the bus. The bin is full of flies and worms. There's a worm in my
    soup. The cheese is green with mould. I bit into a rotten apple. His hands are greasy and filthy. The
    kitchen floor is so sticky. I nearly threw up from the smell. There are flies all over the meat. Ugh, I
    stepped in something slimy. The rubbish stinks, take it out. That meat makes my stomach turn. Ugh, his
    breath smells rotten. The toilet stinks and it's filthy. The smell of it turns my stomach. There is mould
    on the cheese. The milk is sour, throw it away. The fish is slimy and makes me gag. Ugh, there's spit all
    over my cup. Throw that mouldy bread away. The toilet at work makes me gag. There's slimy hair in the
    bath. The sink is full of greasy hair. Ugh, he spits on the kitchen floor. The fridge stinks of sour milk.
    There is a slimy hair in my soup. Who left this filthy thing here? Something rotten is in the fridge. Ugh,
    the table is all sticky. The bathroom is full of mould.""",
    "surprised": """I never expected a letter from him. Really, you did that in one day? Are you serious, I
    won the car? My old boss called out of nowhere. No way, she is your sister? Suddenly the box was full of
    money. Why is there a horse in the garden? Wait, you mean he never left? Oh, I thought you were in Paris.
    I had no idea you could sing. Are you serious, they picked me? Wait, you are the new boss? Wow, you came
    all this way for me? Wow, I didn't know it was that big. Wait, the whole shop is gone? Oh wow, is that
    really for me? I didn't know you two were sisters. Wait, how did this get in my bag? No way, you really
    know him? What, you two are getting married? He came to my door out of nowhere. Since when do you speak
    French? Suddenly the whole room cheered. I never expected to see you here. I can't believe you made all
    this. How did he get in here? I can't believe you have a twin. I had no idea you were married. Since when
    do you have a dog? How did you know my name?""",
}


def sentence_bank(path="", emotions=EMOTIONS):
    """A dict from emotion to its sentences: the 30 above, or those of a table. Raises UserError."""
    return read_sentences(path, emotions) if path else {
        emotion: re.split("(?<=[.?]) ", " ".join(text.split())) for emotion, text in SENTENCES.items()}


def read_sentences(path, emotions=EMOTIONS):
    """The sentences of a CSV with columns emotion and sentence, by emotion. A UserError names a bad line."""
    bank, seen, advice = {emotion: [] for emotion in emotions}, {}, "mend it or leave out --sentences-csv"
    for number, line in read_lines(path, ("emotion", "sentence"), (), advice):
        emotion, sentence = line.values()
        words = tuple(words_in(sentence))
        refuse(path, number, {
            f"{emotion!r} is none of {', '.join(emotions)}": emotion not in {*bank, *EMOTIONS},
            "the sentence has no words": words == ("<unk>",),
            f"the sentence of line {seen.get(words)} again": words in seen}, advice)  # it could cross splits
        bank.get(emotion, []).append(sentence)
        seen[words] = number
    for emotion, sentences in bank.items():
        if len(sentences) < 5:  # a fifth is tested, a fifth validates
            raise UserError(f"{path} has {len(sentences)} of 5 or more sentences for {emotion}: {advice}")
    return bank


def sentences_of(sentences, split, fold):
    """The sentences that a split may draw: no two splits share one, and five folds test each of them once."""
    places = {"test": [0], "validation": [1], "train": [2, 3, 4]}[split]
    return [sentence for index, sentence in enumerate(sentences) if (index - fold) % 5 in places]


class PlainUnpickler(pickle.Unpickler):
    """Reads builtin containers, strings and numbers; refuses whatever would import something."""

    def find_class(self, module, name):
        """Called for everything that is not plain."""
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def read_cache(path):
    """The dict in a transcript cache, {} when there is none. Raises UserError when it is not such a cache."""
    try:
        cache = PlainUnpickler(io.BytesIO(path.read_bytes())).load() if path.exists() else {}
        if not all(isinstance(texts, dict) for texts in [cache, *cache.values()]):
            raise ValueError("it holds no transcripts")
        return cache
    except Exception as error:  # a broken pickle raises almost anything
        raise UserError(f"{path} is no transcript cache ({error}): delete it or name another "
                        "--output-dir") from error


def add_transcripts(clips, cfg, device):
    """Add the column `transcript`, simulated or by Whisper; both leave a cache in OUTPUT_DIR."""
    if not cfg.use_simulated_sentences:
        return clips.assign(transcript=transcribe(clips, cfg, device) if asks_whisper(cfg) else "")
    bank = sentence_bank(cfg.sentences_csv, classes_of(clips))
    path, noise = Path(cfg.cache_dir, "ravdess_transcripts_simulated.pkl"), cfg.sentence_noise
    cache = read_cache(path)
    key = f"{cfg.split} fold {cfg.folds} seed {cfg.seed} noise {noise} bank {digest(bank)}"
    clips = clips.assign(sentence_emotion=deal_emotions(clips, cfg))
    drawn = {row.clip: random.Random(f"{cfg.seed}/{row.clip}").choice(
             sentences_of(bank[row.sentence_emotion], row.split, int(cfg.folds)))
             for row in clips.itertuples()}
    if cache.get(key) != drawn:
        save(path, pickle.dumps(cache | {key: drawn}))
    return clips.assign(transcript=clips["clip"].map(drawn))


def deal_emotions(clips, cfg):
    """The emotions (N,) that sentences are drawn for: those of the clips, SENTENCE_NOISE of them permuted.

    Exactly round(SENTENCE_NOISE * clips) of each split change places, so that at 1 words say nothing.
    """
    emotions, rng = clips["emotion"].to_numpy(dtype=object, copy=True), np.random.default_rng(cfg.seed)
    for split in SPLITS:
        rows = np.flatnonzero(clips["split"] == split)
        chosen = rng.permutation(rows)[:round(cfg.sentence_noise * len(rows))]
        emotions[chosen] = emotions[rng.permutation(chosen)]
    return emotions


def load_whisper(name, device, way_out="leave out --no-use-simulated-sentences"):
    """(module, model) of --whisper-model, a name (downloaded once) or a checkpoint file. Raises UserError."""
    whisper = load_package("whisper", f"pip install openai-whisper, or {way_out}")
    try:
        return whisper, whisper.load_model(name, device="cuda" if device == "cuda" else "cpu")
    except Exception as error:  # no such name, no network, or a file that is something else
        raise UserError(f"--whisper-model {name} cannot be loaded ({type(error).__name__}): "
                        f"name a Whisper checkpoint, or {way_out}") from error


def asks_whisper(cfg):
    """Whether clips are transcribed: no sentences are simulated, and some model reads words."""
    return not cfg.use_simulated_sentences and models_asked(cfg) != ["cnn"]


def said_in(result):
    """The text of a Whisper result; "" where Whisper's own limits say that it made words out of silence."""
    silent = result.no_speech_prob > 0.6 and result.avg_logprob < -1.0
    return "" if silent or result.compression_ratio > 2.4 else result.text.strip()


def word_error_rate(clips):
    """Words wrong, missing or too many in transcripts, as a share of the words of RAVDESS's statements."""
    distance = load_torchaudio().edit_distance
    true = [words_in(STATEMENTS[statement]) for statement in clips["statement"]]
    found = [words_in(text) if text else [] for text in clips["transcript"]]
    return sum(map(distance, true, found)) / sum(map(len, true))


def describe_transcripts(clips):
    """How well Whisper heard RAVDESS's statements, overall, by emotion and by intensity, as sentences."""
    if "statement" not in clips:
        return [f"{(clips['transcript'] == '').sum()} of {len(clips)} transcripts are empty."]
    groups = [("", clips), *clips.groupby("emotion", observed=True),
              *clips.groupby(clips["intensity"].map(INTENSITIES))]
    rates = ", ".join(f"{name} {word_error_rate(part):.1%}".strip() for name, part in groups)
    return [f"Word error rate of Whisper: {rates}; {(clips['transcript'] == '').sum()} empty transcripts.",
            "RAVDESS's two statements are spoken in every emotion: true transcripts carry no label, so rows "
            "that read words alone are expected at chance."]


def transcribe(clips, cfg, device):
    """Whisper's English transcripts (greedy, first 30 s), cached batch by batch under keys of the audio."""
    source = Path(cfg.whisper_model)
    path = Path(cfg.cache_dir, f"ravdess_transcripts_whisper_{source.name.removesuffix('.pt')}.pkl")
    cache = read_cache(path)
    key = digest(source.read_bytes()) if source.is_file() else cfg.whisper_model
    texts = cache.setdefault(f"{key}, silence is empty", {})  # as said_in has it
    todo = clips[~clips["digest"].isin(texts)].drop_duplicates("digest")
    if len(todo):
        whisper, model = load_whisper(cfg.whisper_model, device)
        size = 16 if model.device.type == "cuda" else 4
        for start in tqdm(range(0, len(todo), size), "Transcribing"):
            rows = todo.iloc[start:start + size]
            waves = [load_audio(file, 16000) for file in rows["path"]]
            texts.update(zip(rows["digest"], write_down(waves, whisper, model)))
            save(path, pickle.dumps(cache))
    return clips["digest"].map(texts)


def write_down(waves, whisper, model):
    """What Whisper hears in the first 30 s of each of some waves (n,) at 16 kHz, in English."""
    waves, on_gpu = map(whisper.pad_or_trim, waves), model.device.type == "cuda"
    mels = torch.stack([whisper.log_mel_spectrogram(wave, model.dims.n_mels) for wave in waves])
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=on_gpu)
    return list(map(said_in, model.decode(mels.to(model.device), options)))


# %% 8. Audio features
class AudioError(UserError):
    """Why a recording cannot be used."""


class Silence(AudioError):
    """There is nothing to be heard in a recording."""


def load_audio(path, rate, trim_db=math.inf):
    """A recording as mono float32 samples (n,) at `rate` Hz, both silent ends cut off. Raises AudioError."""
    return prepare_samples(*read_audio(path), rate, trim_db)[0]


def read_audio(path):
    """Samples (n,) of a recording, downmixed, int16 or float32, and their rate in Hz. Raises AudioError."""
    try:
        with soundfile.SoundFile(path) as file:
            plain = file.subtype == "PCM_16"  # libsndfile would take long to make floats of it
            samples = file.read(dtype="int16" if plain else "float32", always_2d=True)
            rate, cut = file.samplerate, 0 < len(samples) < file.frames
    except (soundfile.LibsndfileError, OSError, ValueError, MemoryError) as error:  # such as a wild length
        raise AudioError(f"not readable as audio ({str(error).split(': ')[-1].strip()})") from error
    if cut:
        raise AudioError("cut off")
    if samples.shape[1] == 1:
        return samples[:, 0], rate
    return samples.mean(axis=1, dtype=np.float32) / (32768 if plain else 1), rate


def prepare_samples(samples, own_rate, rate, trim_db):
    """Float32 samples (n,) at `rate` Hz without silent ends, and their start in s. Raises AudioError."""
    scale, peak = 1 / 32768 if samples.dtype == np.int16 else 1.0, peak_of(samples)
    if peak * scale < 1e-4:
        raise Silence("silent" if len(samples) else "no samples in it")
    if not peak * scale < 1e6:
        raise AudioError("NaN, infinite or huge samples")
    loud = loud_part(samples, own_rate, trim_db)  # first, so that there is less to resample
    samples = np.multiply(samples[loud], scale, dtype=np.float32)
    return samples if own_rate == rate else soxr.resample(samples, own_rate, rate), loud.start / own_rate


def peak_of(samples):
    """The largest magnitude of samples (n,) of any type; NaN where one is."""
    return max(float(samples.max(initial=0)), -float(samples.min(initial=0)))


def loud_part(samples, rate, trim_db):
    """The slice without both ends `trim_db` below the clip's own peak, but for 50 ms before, 100 ms after."""
    limit = 0.9999 * peak_of(samples) * 10 ** (-trim_db / 20)  # -32768 has no positive
    limit = samples.dtype.type(math.ceil(limit) if samples.dtype.kind == "i" else limit)
    loud = ((samples >= limit) | (samples <= -limit)).tobytes()  # bytes are searched fast
    return slice(max(0, loud.index(1) - rate // 20), loud.rindex(1) + rate // 10)


def load_torchaudio():
    """torchaudio.functional, or a UserError with the line that repairs an installation that does not load."""
    return load_package("torchaudio.functional", 'pip install "torch==2.11.*" "torchaudio==2.11.*"')


@functools.lru_cache(maxsize=8)
def window_and_bank(rate, n_fft, n_mels):
    """A Hann window (N_FFT,) and mel filters (F, M) from 50 Hz to half the sampling rate, on HTK's scale."""
    bank = load_torchaudio().melscale_fbanks(n_fft // 2 + 1, 50.0, rate / 2, n_mels, rate)
    return torch.hann_window(n_fft), bank


def log_mel(samples, cfg):
    """Natural log of (mel power + 1e-6), float16 (T, M): T frames of HOP_LENGTH, M bands."""
    window, bank = window_and_bank(cfg.sampling_rate, cfg.n_fft, cfg.n_mels)
    spectrum = torch.stft(torch.from_numpy(samples), cfg.n_fft, cfg.hop_length, window=window,
                          pad_mode="constant", return_complex=True).T  # (T, F)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ bank).add_(1e-6).log_().half().numpy()


def prepare_clip(path, cfg):
    """Read, downmix, trim, resample and transform one clip: (T, M), or the reason why not."""
    try:
        return log_mel(load_audio(path, cfg.sampling_rate, cfg.trim_db), cfg)
    except AudioError as error:
        return str(error)


def add_features(clips, audit, cfg):
    """Add the column `mel`: float16 (T, M) views of one memory-mapped cache; unusable clips leave.

    The cache is named by a key of the clips' bytes and of the settings that shape the features.
    """
    load_torchaudio()
    folder = Path(cfg.cache_dir, "cache")
    key = digest("version 2", list(clips["digest"]), {name: getattr(cfg, name) for name in FEATURES})
    data, index = folder / f"log_mel_{key}.npy", folder / f"log_mel_{key}.json"
    if not (data.exists() and index.exists()):
        prepared = in_parallel(lambda path: prepare_clip(path, cfg), clips["path"], "Log-mel spectrograms")
        usable = [mel for mel in prepared if not isinstance(mel, str)]
        if not usable:
            raise UserError(f"no clip in {audit['folder']} can be used ({prepared[0]}): see --ravdess-path "
                            "or --manifest")
        for old in folder.glob("log_mel_*"):
            with contextlib.suppress(OSError):  # Windows keeps what is still mapped
                old.unlink()
        with replacing(data) as temporary:
            np.save(temporary, np.concatenate(usable))
        save(index, [mel if isinstance(mel, str) else len(mel) for mel in prepared])
    entries, frames = read_back(index), read_back(data, functools.partial(np.load, mmap_mode="r"))
    bad = np.array([isinstance(entry, str) for entry in entries])
    audit["left_out"].update((path, entry) for path, entry, b in zip(clips["path"], entries, bad) if b)
    ends = np.cumsum([entry for entry in entries if not isinstance(entry, str)])
    return clips[~bad].reset_index(drop=True).assign(mel=pd.Series(np.split(frames, ends[:-1]), dtype=object))


# %% 9. Text features
def words_in(text):
    """The lower-case words of a text; an empty transcript is one unknown word."""
    return re.findall(r"[\w']+", text.lower()) or ["<unk>"]


def load_transformers():
    """The package, or a UserError that says how to go on without it."""
    return load_package("transformers", "pip install transformers or go without: "
                        "--run-models cnn,rnn,fusion_rnn")


@functools.lru_cache(maxsize=2)
def load_text_encoder(name):
    """A pretrained DistilBERT-like encoder: (configuration, tokenizer JSON, module). Raises UserError."""
    advice = "name a folder with --bert-model FOLDER, or go without: --run-models cnn,rnn,fusion_rnn"
    transformers = load_transformers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        ids = transformers.AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer
        module, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # the hub's clients raise many kinds
        reason = "weights or tokenizer missing" if Path(name).is_dir() else "no network or no such model"
        raise UserError(f"--bert-model {name} cannot be loaded ({reason}): {advice}") from error
    finally:
        transformers.logging.set_verbosity(level)
    if None in map(ids.token_to_id, ("[PAD]", "[CLS]", "[SEP]", "[MASK]")):
        raise UserError(f"--bert-model {name} is not of BERT's family, it has other special tokens: {advice}")
    if missing := [key for key in info["missing_keys"] if "pooler" not in key]:  # they would be random
        raise UserError(f"--bert-model {name} lacks the weights of {missing[0]} and others: {advice}")
    return json.loads(module.config.to_json_string(use_diff=False)), ids.to_str(), module.float()


# %% 10. Batches
VIEWS = (1.0, 1.0), (0.94, 1.0), (1.06, 1.0), (1.0, 1.105), (1.0, 0.905)  # of a test clip: speed, tempo


class ClipDataset(Dataset):
    """Labels of clips and what a model reads of them, or of that `inputs`; indexed by rows, it gives a batch.

    Log-mel windows (B, 1, M, T) are the middle of each clip, or with `augment` a random view of it, mixed up
    if the model only listens; of the words (B, L), `augment` hides WORD_DROPOUT.
    """

    def __init__(self, clips, model, cfg, device, augment=False, inputs=None):
        inputs = inputs or model.inputs
        self.model, self.cfg, self.device, self.augment, self.view = model, cfg, device, augment, VIEWS[0]
        self.labels = torch.tensor(clips["emotion"].cat.codes.to_numpy(np.int64))
        self.classes = len(classes_of(clips))
        self.lengths = torch.tensor([len(mel) for mel in clips["mel"]])  # in frames
        self.firsts = self.lengths.cumsum(0) - self.lengths  # of each clip in mels (all T, M)
        self.mels = torch.from_numpy(np.concatenate([*clips["mel"]])).to(device) if "mel" in inputs else None
        self.words = {} if inputs == ("mel",) else model.tokenize(list(clips["transcript"]))
        self.frames = window_frames(cfg)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        batch = {"label": self.labels[rows]} | {key: ids[rows] for key, ids in self.words.items()}
        if self.augment and self.words:
            ids = next(iter(self.words))
            hide = torch.rand(batch[ids].shape) < self.cfg.word_dropout
            hide &= ~torch.isin(batch[ids], torch.tensor(self.model.special_ids))
            batch[ids] = batch[ids].masked_fill(hide, self.model.hidden_id)
        batch = {key: tensor.to(self.device) for key, tensor in batch.items()}
        if self.mels is not None:
            batch["mel"] = self.windows(rows)
        mixed = self.augment and self.cfg.mixup and not self.words
        return mix(batch, self.classes, self.cfg.mixup) if mixed else batch

    def windows(self, rows):
        """Log-mel windows (B, 1, M, T) of clips, as `augment` and `view` say."""
        n = len(rows)
        if self.augment:
            speed, tempo = torch.exp(spread((n, 1), 0.17)), torch.exp(spread((n, 1), 0.15))
            place, warp, shift = torch.rand(n, 1), torch.exp(spread((n, 1), 0.08)), spread((n, 1), 0.06)
            return disturb(self.read(rows, place, speed, speed * tempo, warp, shift))
        if self.view == VIEWS[0]:
            return self.cut(rows, (self.lengths[rows] - self.frames) // 2, self.frames)
        speed, tempo = (torch.full((n, 1), value) for value in self.view)
        return self.read(rows, 0.5, speed, speed * tempo)

    def cut(self, rows, starts, frames):
        """Frames from `starts` (B,) on, (B, 1, M, frames); at its ends a clip's outermost frames repeat."""
        places = (starts[:, None] + torch.arange(frames)).clamp(min=0)  # (B, frames)
        places = places.minimum(self.lengths[rows, None] - 1) + self.firsts[rows, None]
        return self.mels[places.to(self.device)].float().transpose(1, 2)[:, None]

    def read(self, rows, place, speed, step, warp=1.0, shift=0.0):
        """Windows (B, 1, M, T) at a `place` from 0 to 1, in another voice, `step` frames of the clip a frame.

        Played s times as fast, a clip lasts 1 / s as long and what was at f Hz is heard at s * f Hz: both are
        a matter of where in the spectrogram to read (Jaitly and Hinton 2013 warp vocal tracts much alike).
        """
        slack = self.lengths[rows, None] - self.frames * step  # (B, 1)
        starts = place * slack  # of the window in the clip; negative: of the clip in the window
        source = math.ceil(self.frames * float(step.max())) + 2
        mel = self.cut(rows, starts[:, 0].floor().long(), source)
        time = (starts - starts.floor() + step * torch.arange(self.frames)) * 2 / (source - 1) - 1  # (B, T)
        band = bands_heard(speed, mel.shape[2], self.cfg.sampling_rate) * warp + shift  # (B, M)
        grid = torch.stack(torch.broadcast_tensors(time[:, None], band[:, :, None]), dim=3)  # (B, M, T, 2)
        return F.grid_sample(mel, grid.to(self.device).clamp(-1, 1), align_corners=True)  # as MPS can


def window_frames(cfg):
    """The frames of a window of CLIP_SECONDS."""
    return round(cfg.clip_seconds * cfg.sampling_rate / cfg.hop_length)


def batches_of(dataset, size, shuffle=False):
    """A loader of batches that the dataset makes whole, `size` clips each."""
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))


def spread(shape, limit, device="cpu"):
    """Numbers drawn evenly between -limit and limit."""
    return (torch.rand(shape, device=device) * 2 - 1) * limit


def bands_heard(speed, n_mels, rate):
    """The places (B, M) on the mel axis, -1 to 1, that its bands hear at `speed` (B, 1) times the speed."""
    low, high = (math.log1p(hertz / 700) for hertz in (50, rate / 2))
    mel = torch.linspace(low, high, n_mels + 2)[1:-1]
    return (torch.log1p(torch.expm1(mel) / speed) - mel[0]) * 2 / (mel[-1] - mel[0]) - 1


def disturb(mel):
    """Another room and microphone (tilt and ripple, up to 3 dB each) and SpecAugment's masks."""
    n, (bands, frames), device = len(mel), mel.shape[2:], mel.device
    axis = torch.linspace(-1, 1, bands, device=device)[None]  # (1, M)
    draw = functools.partial(spread, (n, 1), device=device)
    ripple = torch.cos(math.pi * (axis * (1 + draw(0.75)) + draw(1)))
    colour = (draw(3) * axis + draw(3) * ripple) * math.log(10) / 10  # dB of power -> natural log
    mel = mel + colour[:, None, :, None]
    mel = mel - mel.mean(dim=(2, 3), keepdim=True)  # so that hidden means average
    hide = load_torchaudio().mask_along_axis_iid
    for _ in range(2):
        mel = hide(hide(mel, max(1, bands * 10 // 64), 0.0, 2), max(1, frames // 10), 0.0, 3)
    return mel


def mix(batch, classes, strength):
    """Mixup (Zhang et al. 2018): every clip gets a random partner, one Beta-distributed weight a batch."""
    weight = float(torch.distributions.Beta(strength, strength).sample())
    order = torch.randperm(len(batch["label"]), device=batch["label"].device)
    batch["label"] = F.one_hot(batch["label"], classes).float()  # (B,) -> (B, C)
    return {key: weight * value + (1 - weight) * value[order] for key, value in batch.items()}


# %% 11. AudioCNN
class Encoder(nn.Module):
    """What all models share: features, classified by a head; the unimodal ones pool them from a sequence.

    A subclass names the batch keys it reads in `inputs`, has a `head`, and defines `sequence(batch)`, steps
    of `step_width`, and `pool(sequence, mask)`, features of `width`. `spec` holds the constructor's arguments
    as builtins, for the checkpoint.
    """

    inputs = ()

    def __init__(self, **spec):
        super().__init__()
        self.spec, self.dropout = spec, nn.Dropout(spec["dropout"])

    def features(self, batch):
        """One vector per clip, (B, D)."""
        return self.pool(*self.sequence(batch))

    def forward(self, batch):
        """Logits (B, C)."""
        return self.head(self.dropout(self.features(batch)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); squeeze-excitation (Hu et al. 2018) if asked."""

    def __init__(self, inputs, outputs, stride, squeeze=False):
        super().__init__()

        def normed(*shape):
            """A convolution and its normalisation."""
            return nn.Conv2d(*shape, bias=False), nn.BatchNorm2d(outputs)
        self.body = nn.Sequential(*normed(inputs, outputs, 3, stride, 1), nn.ReLU(),
                                  *normed(outputs, outputs, 3, 1, 1))
        self.shortcut = nn.Sequential(*normed(inputs, outputs, 1, stride))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs // 8, 1), nn.ReLU(),
                                  nn.Conv2d(outputs // 8, outputs, 1), nn.Sigmoid()) if squeeze else None

    def forward(self, x):
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = self.body(x)
        return F.relu((y if self.gate is None else y * self.gate(y)) + self.shortcut(x))


class AudioCNN(Encoder):
    """A 2-D CNN on log-mel windows, four bands of them kept apart, a GRU over time, attentive statistics."""

    inputs, step_width, width = ("mel",), 128, 256

    def __init__(self, classes, dropout):
        super().__init__(classes=classes, dropout=dropout)
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            ResidualBlock(32, 64, 2), ResidualBlock(64, 128, 2),
            ResidualBlock(128, 128, (2, 1), squeeze=True))
        self.project = nn.Sequential(nn.Conv1d(4 * 128, 128, 1, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.recurrent = nn.GRU(128, 64, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
        self.head = nn.Linear(self.width, classes)

    def sequence(self, batch):
        """mel (B, 1, M, T) -> steps (B, S, 128), S = T / 8, and their mask (B, S), all true."""
        deviation, mean = torch.std_mean(batch["mel"], dim=(2, 3), keepdim=True)
        x = (batch["mel"] - mean) / (deviation + 1e-5)  # each window by itself: loudness says nothing
        x = self.convolutions(x)  # (B, 1, M, T) -> (B, 128, M / 16, S)
        if x.shape[2] != 4:  # not 64 mel bands
            x = F.adaptive_avg_pool2d(x, (4, x.shape[3]))
        x = x.flatten(1, 2)  # (B, 4 * 128, S)
        x = self.project(x).transpose(1, 2)  # (B, S, 128)
        return x + self.recurrent(x)[0], torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def pool(self, steps, mask):
        """Attentive mean and standard deviation over time (Okabe et al. 2018): (B, S, 128) -> (B, 256)."""
        weight = self.attention(steps).masked_fill(~mask[..., None], -math.inf).softmax(dim=1)  # (B, S, 1)
        mean = (weight * steps).sum(dim=1)
        variance = (weight * (steps - mean[:, None]) ** 2).sum(dim=1)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


# %% 12. TextRNN, TextBERT
def masked_mean(steps, mask):
    """Mean over the steps (B, S, D) whose mask (B, S) is true: (B, D)."""
    mask = mask[..., None].to(steps.dtype)
    return (steps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class TextRNN(Encoder):
    """Word embeddings, a bidirectional LSTM, mean and maximum over the words."""

    inputs, step_width, width = ("tokens",), 128, 256
    hidden_id, special_ids = 1, [0]

    def __init__(self, classes, dropout, vocabulary, max_tokens):
        super().__init__(classes=classes, dropout=dropout, vocabulary=vocabulary, max_tokens=max_tokens)
        self.ids = {word: index for index, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary), 100, padding_idx=0)
        self.recurrent = nn.LSTM(100, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(self.width, classes)

    def tokenize(self, texts):
        """Texts -> {"tokens": (N, L)}, padded with 0 to the longest."""
        limit = self.spec["max_tokens"]
        rows = [torch.tensor([self.ids.get(word, 1) for word in words_in(text)[:limit]]) for text in texts]
        return {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def sequence(self, batch):
        """tokens (B, L) -> steps (B, L, 128) and the mask of words (B, L); padding is never read."""
        mask = batch["tokens"] != 0
        embedded, lengths = self.dropout(self.embedding(batch["tokens"])), mask.sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, True, enforce_sorted=False)
        steps, _ = self.recurrent(packed)
        return nn.utils.rnn.pad_packed_sequence(steps, True, total_length=mask.shape[1])[0], mask

    def pool(self, steps, mask):
        """(B, L, 128) -> (B, 256)."""
        most = steps.masked_fill(~mask[..., None], -math.inf).amax(dim=1)
        return torch.cat([masked_mean(steps, mask), most], dim=1)


class TextBERT(Encoder):
    """A pretrained DistilBERT-like encoder, fine-tuned whole, mean-pooled over its tokens."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, classes, dropout, config, tokenizer, max_tokens):
        super().__init__(classes=classes, dropout=dropout, config=config, tokenizer=tokenizer,
                         max_tokens=max_tokens)
        transformers = load_transformers()
        import tokenizers
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self.tokenizer.enable_truncation(min(max_tokens, config["max_position_embeddings"]))
        self.tokenizer.enable_padding()
        self.special_ids = [self.tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
        self.hidden_id = self.tokenizer.token_to_id("[MASK]")
        self.encoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config)).float()
        self.step_width = self.width = self.encoder.config.hidden_size
        self.head = nn.Linear(self.width, classes)

    def tokenize(self, texts):
        """Texts -> {"input_ids": (N, L), "attention_mask": (N, L)}."""
        encoded = self.tokenizer.encode_batch(texts)
        return {"input_ids": torch.tensor([text.ids for text in encoded]),
                "attention_mask": torch.tensor([text.attention_mask for text in encoded])}

    def sequence(self, batch):
        """input_ids, attention_mask (B, L) -> steps (B, L, D) and the mask as booleans (B, L)."""
        output = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.last_hidden_state, batch["attention_mask"].bool()

    pool = staticmethod(masked_mean)  # (B, L, D) -> (B, D)


# %% 13. Fusion
class CrossAttention(nn.Module):
    """Steps of one modality, each with what it finds in the other (Tsai et al. 2019 do so in MulT)."""

    def __init__(self, width, other, dropout):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(other)])
        self.attention = nn.MultiheadAttention(width, 4, dropout, bias=False, add_zero_attn=True, kdim=other,
                                               vdim=other, batch_first=True)

    def forward(self, steps, others, mask):
        """(B, S, D), (B, L, E), mask (B, L) -> (B, S, D); where all is masked, the steps as they were."""
        others = self.norms[1](others)
        found, _ = self.attention(self.norms[0](steps), others, others, ~mask, need_weights=False)
        return steps + found


class EarlyFusion(Encoder):
    """A classification head on the joined features of frozen, trained unimodal models.

    `parts` maps short names to specs, `fusion` is concat or attention. Features of training clips are
    memorised, so the head is fitted on disturbed sound and words, and every other clip loses one of the two:
    it must learn to use either, and answers batches that lack the keys of one.
    """

    def __init__(self, classes, dropout, parts, fusion):
        super().__init__(classes=classes, dropout=dropout, parts=parts, fusion=fusion)
        self.encoders = nn.ModuleDict({name: MODELS[name].kind(**spec) for name, spec in parts.items()})
        self.encoders.requires_grad_(False)
        (sound, cnn), (words, text) = self.encoders.items()
        self.inputs = cnn.inputs + text.inputs
        self.tokenize, self.special_ids, self.hidden_id = text.tokenize, text.special_ids, text.hidden_id
        self.norms = nn.ModuleDict({name: nn.LayerNorm(part.width) for name, part in self.encoders.items()})
        self.cross = nn.ModuleDict({
            sound: CrossAttention(cnn.step_width, text.step_width, dropout),
            words: CrossAttention(text.step_width, cnn.step_width, dropout)} if fusion == "attention" else {})
        self.head = nn.Sequential(nn.Linear(cnn.width + text.width, 128), nn.ReLU(), nn.Dropout(dropout),
                                  nn.Linear(128, classes))

    def train(self, mode=True):
        """Training mode for the head alone: the encoders stay as they were trained."""
        super().train(mode)
        self.encoders.eval()
        return self

    def forward(self, batch):
        """Logits (B, C); of one modality alone, averaged with those of its own, longer trained head."""
        logits = super().forward(batch)
        there = [part for part in self.encoders.values() if set(part.inputs) <= set(batch)]
        if self.training or len(there) == len(self.encoders):
            return logits
        return (logits.log_softmax(dim=1) + there[0](batch).log_softmax(dim=1)) / 2

    def features(self, batch):
        """The features of all parts, normalised and joined, zeros for what is missing: (B, D)."""
        size, device, joined = len(next(iter(batch.values()))), self.head[0].weight.device, []
        chance = torch.rand(size, device=device) if self.training else torch.full((size,), 0.5).to(device)
        kept = dict(zip(self.encoders, (chance > 0.25, chance < 0.75)))  # (B,) each
        with torch.no_grad():
            heard = {name: part.sequence(batch) for name, part in self.encoders.items()
                     if set(part.inputs) <= set(batch)}
        for (name, part), other in zip(self.encoders.items(), reversed(list(self.encoders))):
            if name not in heard:
                joined.append(self.norms[name](torch.zeros(size, part.width, device=device)))
                continue
            steps, mask = heard[name]
            if self.cross and other in heard:
                steps = self.cross[name](steps, heard[other][0], heard[other][1] & kept[other][:, None])
            joined.append(self.norms[name](part.pool(steps, mask) * kept[name][:, None]))
        return torch.cat(joined, dim=1)


# %% 14. Training, prediction, scores, checkpoints
# A row of every table: class, stem of its files, title, suffix of its constants. Rows without class are made
# of others, their parts: views, ensemble, mean, learned weights, or what they say to audio or text alone.
ModelRow = namedtuple("ModelRow", "kind stem title suffix parts how", defaults=[(), ""])
ROWS = {  # in the order of the tables, parts first
    "cnn": ModelRow(AudioCNN, "AudioCNN", "AudioCNN", "cnn"),
    "cnn_views": ModelRow(None, "AudioCNN_views", "AudioCNN, several views", "", ("cnn",), "views"),
    "cnn_ensemble": ModelRow(None, "AudioCNN_ensemble", "AudioCNN, ensemble", "", ("cnn",), "ensemble"),
    "cnn_views_ensemble": ModelRow(None, "AudioCNN_views_ensemble", "AudioCNN, ensemble, views", "",
                                   ("cnn_views",), "ensemble"),
    "rnn": ModelRow(TextRNN, "TextRNN", "TextRNN", "rnn"),
    "bert": ModelRow(TextBERT, "TextBERT", "TextBERT", "bert"),
}
FUSIONS = {"fusion": (EarlyFusion, "Early", "concat"), "attention": (EarlyFusion, "Attention", "attention"),
           "late": (None, "Late", "mean"), "learned": (None, "Learned late", "learned")}
ROWS |= {f"{fusion}_{text}": ModelRow(kind, f"{title.split()[0]}Fusion_{text.upper()}",
                                      f"{title} fusion, {text.upper()}", "fusion", ("cnn", text), how)
         for fusion, (kind, title, how) in FUSIONS.items() for text in ("rnn", "bert")}
ROWS |= {f"{name}_{modality}": ModelRow(None, f"{row.stem}_{modality}_only", f"{row.title}, {modality} only",
                                        "", (name,), modality)
         for name, row in ROWS.items() if row.kind is EarlyFusion for modality in ("audio", "text")}
MODELS = {name: row for name, row in ROWS.items() if row.kind}  # what is trained, parts first
FILES = {"history": "histories/{}.csv", "predictions": "predictions/{}.csv", "checkpoint": "{}_best.pth",
         "state": "{}_training.pth",  # of a training that is not finished
         "weights": "{}.json", "out_of_fold": "predictions/{}_out_of_fold.csv"}
RESULTS = "history", "predictions", "checkpoint"  # what a training leaves, in this order
TRAIN_AGAIN = "train with --phase all, or name another --output-dir"


def file_of(cfg, kind, name):
    """The path of one of a row's FILES."""
    return Path(cfg.output_dir, FILES[kind].format(ROWS[name].stem))


def rows_of(cfg):
    """The names of the rows that these settings ask for, trained or made of others."""
    asked, names = {"views": cfg.test_views > 1, "ensemble": cfg.runs > 1}, []
    asked |= {how: cfg.fusion in (how, "both") for how in ("concat", "attention")}
    for name, row in ROWS.items():
        if asked.get(row.how, True) and set(row.parts) <= set(names):
            names.append(name)
    return names


def models_asked(cfg):
    """The names of the models that RUN_MODELS and FUSION ask for, parts first."""
    asked = set(names_in(cfg.run_models)) & ({"cnn"} if cfg.no_words else set(MODELS))
    return [name for name in rows_of(cfg) if name in MODELS and name.replace("attention", "fusion") in asked]


def pick_device(cfg):
    """The torch device type of --device: cuda, mps or cpu. Raises UserError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name, usable in there.items() if usable) if cfg.device == "auto" else cfg.device
    if not there[device]:
        raise UserError(f"--device {device} is not available here: leave it out or use --device cpu")
    return device


def training_precision(device):
    """The lower precision that training on this device gains from, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")]
    return torch.bfloat16 if device == "cpu" and any(has) else torch.float32


def build_model(name, clips, cfg, device):
    """A model ready for training: seeded, with its vocabulary, pretrained encoder or trained parts."""
    torch.manual_seed(cfg.seed)
    row, weights = MODELS[name], {}
    spec = {"classes": len(classes_of(clips)), "dropout": settings_for(cfg, name)["dropout"]}
    if name == "bert":
        config, tokenizer, pretrained = load_text_encoder(cfg.bert_model)
        spec |= {"config": config, "tokenizer": tokenizer, "max_tokens": cfg.max_tokens}
        weights = {"encoder": pretrained}
    elif name == "rnn":
        words = set(words_in(" ".join(clips.loc[clips["split"] == "train", "transcript"]))) - {"<unk>"}
        spec |= {"vocabulary": ["<pad>", "<unk>", *sorted(words)], "max_tokens": cfg.max_tokens}
    elif row.parts:
        parts = {part: restore_model(file_of(cfg, "checkpoint", part)) for part in row.parts}
        spec |= {"parts": {part: trained.spec for part, trained in parts.items()}, "fusion": row.how}
        weights = {f"encoders.{part}": trained for part, trained in parts.items()}
    model = row.kind(**spec)
    for module, source in weights.items():
        model.get_submodule(module).load_state_dict(source.state_dict())
    return model.to(device, memory_format=torch.channels_last)  # faster convolutions


class Trainer:
    """Takes one optimiser step after another; `average`, the moving average of the weights, is the result."""

    def __init__(self, model, settings, steps, device):
        self.model, self.device, self.precision = model, device, training_precision(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.ndim > 1]},
                  {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]  # biases and norms
        rate = settings["learning_rate"]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=settings["weight_decay"])
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, steps, pct_start=0.15)
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == torch.float16)
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings["label_smoothing"])
        self.average, self.ema_decay, self.steps = copy.deepcopy(model), settings["ema_decay"], 0
        self.generators = [torch] if device == "cpu" else [torch, getattr(torch, device)]

    def state(self):
        """All that the next step depends on, as tensors and builtins."""
        return {"steps": self.steps, "generators": [source.get_rng_state() for source in self.generators],
                **{key: trained_tensors(getattr(self, key)) for key in ("model", "average")},
                **{key: getattr(self, key).state_dict() for key in ("optimizer", "schedule", "scaler")}}

    @torch.no_grad()
    def load(self, state):
        """Take over what `state()` gave; a state of something else raises almost anything."""
        self.steps = state["steps"]
        for key in ("model", "average"):
            for name, tensor in trained_tensors(getattr(self, key)).items():
                tensor.copy_(state[key][name])
        for key in ("optimizer", "schedule", "scaler"):
            getattr(self, key).load_state_dict(state[key])
        for source, value in zip(self.generators, state["generators"]):
            source.set_rng_state(value)

    @torch.no_grad()
    def update_average(self):
        """Move the average towards the model; faster at first, so that a short training forgets its start."""
        decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for average, current in zip(self.average.state_dict().values(), self.model.state_dict().values()):
            average.copy_(average.lerp(current, 1 - decay) if average.is_floating_point() else current)

    def step(self, batch):
        """Train on one batch; returns (loss, share of clips whose strongest label was found)."""
        with torch.autocast(self.device, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(batch)
            loss = self.loss(logits.float(), batch["label"])
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.update_average()
        label = batch["label"] if batch["label"].ndim == 1 else batch["label"].argmax(dim=1)
        return float(loss.detach()), float((logits.argmax(dim=1) == label).float().mean())


def trained_tensors(model):
    """The tensors of a model by name, without those of a fusion's frozen parts."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("encoders.")}


def resume(trainer, path, mark):
    """The history so far of the training whose state lies at `path`, taken over by `trainer`; [] if none."""
    if not path.exists():
        return []
    untouched = copy.deepcopy(trainer.state())
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        reason = differences(state["fingerprint"], mark)
        if not reason:
            trainer.load(state["trainer"])
            return state["history"]
    except Exception as error:  # truncated, foreign and hostile files raise many kinds
        trainer.load(untouched)
        reason = f"not usable, {type(error).__name__}"
    print(f"  {path} is passed over ({reason}): training starts anew")
    return []


def fit(model, train, validation, settings, device, path, mark):
    """Train for the full schedule; the averaged model and a history row per epoch. Raises UserError.

    Every epoch leaves its state at `path`; the next call with the same `mark` goes on from there.
    """
    loader = batches_of(train, settings["batch_size"], shuffle=True)
    trainer = Trainer(model, settings, settings["epochs"] * len(loader), device)
    history = resume(trainer, path, mark)
    if history:
        print(f"  goes on after epoch {len(history)} of {settings['epochs']}")
    print("  epoch  train loss  train acc   val loss    val acc    val UAR  seconds")
    for epoch in range(len(history) + 1, settings["epochs"] + 1):
        start = time.perf_counter()
        model.train()
        loss, accuracy = np.mean([trainer.step(batch) for batch in loader], axis=0).tolist()
        if not math.isfinite(loss):
            raise UserError(f"the training loss is {loss} in epoch {epoch}: lower --learning-rate")
        logits = predict(trainer.average, validation)
        found, true = logits.argmax(dim=1), validation.labels
        history.append({"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy,
                        "validation_loss": float(F.cross_entropy(logits, true)),
                        "validation_accuracy": float((found == true).float().mean()),
                        "validation_uar": recall(true, found), "seconds": time.perf_counter() - start})
        print("  {:5d} {:11.3f} {:10.1%} {:10.3f} {:10.1%} {:10.1%} {:8.1f}".format(*history[-1].values()),
              flush=True)
        with replacing(path) as temporary:
            torch.save({"fingerprint": mark, "history": history, "trainer": trainer.state()}, temporary)
    return trainer.average, pd.DataFrame(history)


@torch.inference_mode()
def predict(model, dataset):
    """Logits (N, C) in float32 on the CPU, in the dataset's order."""
    model.eval()
    return torch.cat([model(batch).float().cpu() for batch in batches_of(dataset, 64)])


def fit_temperature(logits, labels):
    """The temperature that minimises the NLL of softmax(logits / temperature) (Guo et al. 2017)."""
    grid = np.geomspace(0.5, 12, 300).tolist()  # a validation split without a mistake would ask for 0
    return min(grid, key=lambda temperature: float(F.cross_entropy(logits / temperature, labels)))


def recall(true, predicted):
    """UAR: the mean of the recalls of the classes that occur in `true`."""
    labels = np.unique(true)
    return float(metrics.recall_score(true, predicted, labels=labels, average="macro", zero_division=0))


def reliability(probabilities, true, bins=15):
    """Clips, their summed confidence and right answers in each of equal bins of confidence: (3, bins)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.stack([np.bincount(which, weights, bins) for weights in (None, confidence, right)])


def calibration_error(probabilities, true):
    """ECE: mean distance of confidence and accuracy over the bins of confidence, weighted by their size."""
    _, confidence, right = reliability(probabilities, true)
    return float(abs(confidence - right).sum() / len(true))


def calibration_error_if_perfect(probabilities, clips, draws=200):
    """The ECE by chance when labels follow probabilities (N, C) exactly; rows of one clip share a draw."""
    names, which = np.unique(clips, return_inverse=True)
    edges = probabilities.cumsum(axis=1)
    places = np.random.default_rng(0).random((draws, len(names), 1))[:, which] * edges[:, -1:]
    labels = (edges > places).argmax(axis=2)  # (draws, N)
    return float(np.mean([calibration_error(probabilities, drawn) for drawn in labels]))


def score(probabilities, true, classes):
    """Every figure of every table from probabilities (N, C) and label indices (N,), as a dict of builtins."""
    probabilities = np.clip(probabilities, 1e-7, 1)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    found, labels = probabilities.argmax(axis=1), list(range(len(classes)))
    report = metrics.classification_report(true, found, labels=labels, target_names=classes,
                                           output_dict=True, zero_division=0)
    return {
        "clips": len(true), "accuracy": float((found == true).mean()), "uar": recall(true, found),
        "macro_f1": float(report["macro avg"]["f1-score"]),
        "nll": float(metrics.log_loss(true, probabilities, labels=labels)),
        "ece": calibration_error(probabilities, true),
        "reliability": reliability(probabilities, true).tolist(),
        "per_class": {e: {key: float(value) for key, value in report[e].items()} for e in classes},
        "confusion": metrics.confusion_matrix(true, found, labels=labels).tolist(),
    }


def labels_of(table):
    """The true label indices (N,) of a predictions table."""
    return table["true"].map(classes_of(table).index).to_numpy()


def score_table(table):
    """The figures of a predictions table."""
    return score(probabilities_of(table), labels_of(table), classes_of(table))


def probabilities_of(table):
    """The probabilities (N, C) of a predictions table."""
    return table[classes_of(table)].to_numpy()


def read_checkpoint(path):
    """The contents of a checkpoint, tensors left on disk until used. Raises UserError when it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "spec", "weights", "classes", "fingerprint", "scores", "epochs"} <= set(checkpoint):
            raise ValueError("not written by this script")
        return checkpoint
    except Exception as error:  # missing, truncated, foreign and hostile files raise many kinds
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"is not a usable checkpoint ({type(error).__name__})"
        raise UserError(f"{path} {reason}: {TRAIN_AGAIN}") from error


def restore_model(path):
    """The model of a checkpoint, on the CPU, in evaluation mode."""
    checkpoint = read_checkpoint(path)
    try:
        model = MODELS[checkpoint["model"]].kind(**checkpoint["spec"])
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} was made by another version of this script: {TRAIN_AGAIN}") from error
    return model.eval()


def fingerprint(cfg, name, clips=None):
    """What a checkpoint depends on, as a flat dict: settings, with `clips` the data too, and its parts'."""
    mark = settings_for(cfg, name) | {"version": 2}  # of the networks and their training
    keys = ["seed", "split", "folds"] + {"cnn": [*FEATURES, "mixup"]}.get(name, ["word_dropout"])
    keys += ["max_tokens", "use_simulated_sentences"] if name in ("rnn", "bert") else []
    keys += ["bert_model"] if name == "bert" else []
    mark = {key: str(value) for key, value in (mark | {key: getattr(cfg, key) for key in keys}).items()}
    for part in MODELS[name].parts:
        mark |= {f"{part} {key}": value for key, value in fingerprint(cfg, part, clips).items()}
    if clips is not None and not MODELS[name].parts:
        columns = ["clip", "digest", "emotion", "split"] + (["transcript"] if name != "cnn" else [])
        mark["data"] = digest(clips[columns].to_csv(index=False))
        if name == "bert" and Path(cfg.bert_model).is_dir():
            mark["encoder"] = folder_digest(cfg.bert_model)
    return mark


@functools.lru_cache(maxsize=2)
def folder_digest(folder):
    """A key of the content of all files in a folder."""
    return digest(*(digest(path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.is_file()))


def differences(old, new):
    """What changed between two fingerprints, as text; empty when nothing did."""
    return ", ".join(f"{key} changed" if key.endswith("data") else f"{key} {old.get(key)} -> {new[key]}"
                     for key in new if old.get(key) != new[key])


def out_of_date(cfg, name, clips=None):
    """Why a model must be trained, in words; "" when its files can be reused as they are."""
    *others, checkpoint = (file_of(cfg, kind, name) for kind in RESULTS)
    if not checkpoint.exists():
        return "not trained yet"
    if not all(path.exists() for path in others):
        return "its history or predictions are missing"
    try:
        return differences(read_checkpoint(checkpoint)["fingerprint"], fingerprint(cfg, name, clips))
    except UserError as error:
        return str(error)


def train_model(name, clips, cfg, device):
    """Train one model; write history, predictions and checkpoint, keeping the old one as *.previous.pth.

    Whenever it is killed, the state of its last epoch is there until the checkpoint is.
    """
    settings, path = settings_for(cfg, name), file_of(cfg, "checkpoint", name)
    model = build_model(name, clips, cfg, device)
    parts = {split: clips[clips["split"] == split] for split in SPLITS}
    train = ClipDataset(parts["train"], model, cfg, device, augment=True)
    fixed = {split: ClipDataset(part, model, cfg, device) for split, part in parts.items()}
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{ROWS[name].title}: {size:,} trained parameters, {len(train)} clips", flush=True)
    mark, state = fingerprint(cfg, name, clips), file_of(cfg, "state", name)
    model, history = fit(model, train, fixed["validation"], settings, device, state,
                         mark | {"device": f"{device} {training_precision(device)}"})
    logits = {split: predict(model, dataset) for split, dataset in fixed.items()}
    temperature = fit_temperature(logits["validation"], fixed["validation"].labels)
    probabilities = {split: (values / temperature).softmax(dim=1).numpy() for split, values in logits.items()}
    table = pd.concat([predictions_table(parts[split], probabilities[split]) for split in SPLITS])
    classes = classes_of(clips)
    if path.exists():  # first, so that no checkpoint ever stands beside the files of another
        path.replace(path.with_suffix(".previous.pth"))
    save_table(file_of(cfg, "history", name), history, cfg)
    save_table(file_of(cfg, "predictions", name), table, cfg)
    with replacing(path) as temporary:
        torch.save({
            "model": name, "spec": model.spec, "weights": model.state_dict(), "classes": classes,
            "temperature": temperature, "features": {key: getattr(cfg, key) for key in FEATURES},
            "config": settings_of(cfg), "versions": versions(), "fingerprint": mark,
            "scores": score(probabilities["validation"], fixed["validation"].labels.numpy(), classes),
            "epochs": settings["epochs"], "marks": marks(cfg)}, temporary)
    state.unlink(missing_ok=True)


def predictions_table(clips, probabilities):
    """A row per clip: its split, actor, true emotion, a probability per emotion, the strongest of them."""
    table = clips[["split", "clip", "actor", "emotion"]].rename(columns={"emotion": "true"})
    columns = pd.DataFrame(probabilities, table.index, classes_of(clips))
    return table.astype({"true": object}).join(columns).assign(predicted=columns.idxmax(axis=1))


def with_probabilities(table, probabilities):
    """A predictions table with other probabilities (N, C), and the strongest emotion by them."""
    table = table.copy()
    table[classes_of(table)] = probabilities
    return table.assign(predicted=table[classes_of(table)].idxmax(axis=1))


def settings_of(cfg):
    """All settings as a dict of builtins."""
    return {name.lower(): getattr(cfg, name.lower()) for name in SETTINGS}


def versions():
    """The versions of what a result depends on."""
    return {"python": platform.python_version(), "platform": platform.platform(terse=True),
            **{module.__name__: str(module.__version__) for module in (torch, np, pd)}}


# %% 15. Evaluation: rows made of others, figures, intervals
def reads_oracle(name, cfg):
    """Whether a row reads sentences that were drawn by label."""
    return cfg.use_simulated_sentences and not name.startswith("cnn") and ROWS[name].how != "audio"


def pool(tables):
    """The mean log-probability of tables of the same clips, with a temperature fitted on validation."""
    table, logs = tables[0], [np.log(probabilities_of(part).clip(1e-7)) for part in tables]
    logits = torch.from_numpy(np.mean(logs, axis=0))
    held_out = torch.tensor((table["split"] == "validation").to_numpy())
    labels = torch.tensor(labels_of(table))
    temperature = fit_temperature(logits[held_out], labels[held_out])
    return with_probabilities(table, (logits / temperature).softmax(dim=1).numpy())


def fit_fusion_weights(logs, labels):
    """Non-negative weights (P,) of log-probabilities (P, N, C) with the least class-balanced NLL.

    A penalty draws them to 1 / P, the geometric mean: two validation actors leave much open. Its strength
    was chosen where weights of one validation actor are scored on the other.
    """
    share, even = 1 / np.bincount(labels)[labels], 1 / len(logs)

    def loss(weights):
        """What is minimised."""
        joined = log_softmax(np.tensordot(weights, logs, 1), axis=1)
        nll = -np.average(joined[np.arange(len(labels)), labels], weights=share)
        return nll + 0.05 * ((weights - even) ** 2).sum()
    return minimize(loss, np.full(len(logs), even), bounds=[(0, None)] * len(logs)).x


def combine_late(name, cfg):
    """Late fusion as a predictions table: the mean of two rows' probabilities, or with learned weights."""
    tables = [read_predictions(cfg, part) for part in ROWS[name].parts]
    found, table = dict(zip(ROWS[name].parts, map(probabilities_of, tables))), tables[-1]
    if ROWS[name].how == "learned":
        held_out = (table["split"] == "validation").to_numpy()
        logs = np.log(np.stack(list(found.values()))[:, held_out].clip(1e-7))
        weights = fit_fusion_weights(logs, labels_of(table)[held_out]).tolist()
        save(file_of(cfg, "weights", name), dict(zip(found, weights)))
    return with_probabilities(table, fuse_late(name, found, cfg))


def fuse_late(name, found, cfg):
    """The mean of the probabilities (N, C) `found` of a row's parts, or softmax of weighted logarithms."""
    parts = ROWS[name].parts
    probabilities = np.stack([found[part] for part in parts])  # (P, N, C)
    if ROWS[name].how == "mean":
        return probabilities.mean(axis=0)
    weights = read_back(file_of(cfg, "weights", name))
    return softmax(np.tensordot([weights[part] for part in parts], np.log(probabilities.clip(1e-7)), 1), 1)


def answer_anew(name, clips, cfg, device):
    """The predictions of a trained model from TEST_VIEWS views of each clip, or from one modality alone."""
    model, how = restore_model(file_of(cfg, "checkpoint", ROWS[name].parts[0])).to(device), ROWS[name].how
    keys = [key for key in model.inputs if how == "views" or (key == "mel") == (how == "audio")]
    clips = clips if how == "views" else clips[clips["split"] != "train"]  # nobody looks at those
    dataset, tables = ClipDataset(clips, model, cfg, device, inputs=tuple(keys)), []
    for dataset.view in VIEWS[:cfg.test_views if how == "views" else 1]:
        tables.append(predictions_table(clips, predict(model, dataset).softmax(dim=1).numpy()))
    return pool(tables)


def combine(clips, cfg, device):
    """Write the predictions of rows made of others; says of each row why it has none ("" if it has)."""
    reasons, asked = {}, models_asked(cfg)
    for name in rows_of(cfg):
        path = file_of(cfg, "predictions", name)
        if name in MODELS:
            reasons[name] = out_of_date(cfg, name, clips)
            if reasons[name] and name not in asked:
                reasons[name] = cfg.no_words or "left out by --run-models"
            continue
        missing = [ROWS[part].title for part in ROWS[name].parts if reasons[part]]
        reasons[name] = f"{' and '.join(missing)} did not run" if missing else ""
        if missing:
            for stale in (path, file_of(cfg, "weights", name)):
                stale.unlink(missing_ok=True)
        elif len(ROWS[name].parts) == 2:
            save_table(path, combine_late(name, cfg), cfg)
        elif ROWS[name].how != "ensemble":  # which needs all runs
            whole = file_of(cfg, "predictions", ROWS[name].parts[0]).read_bytes()
            key = digest("version 2", whole, cfg.test_views)
            reuse(path.stem, key, [path], cfg, lambda name=name, path=path: save_table(
                path, answer_anew(name, clips, cfg, device), cfg))
    return reasons


def pooled(name, runs, tables):
    """The predictions of one row in all runs, with their fold and seed and what the clips are like."""
    parts = []
    for cfg, clips in zip(runs, tables):
        traits = clips.filter(["clip", "actor", "transcript", "intensity", "sex"])
        part = read_predictions(cfg, name).drop(columns="actor").merge(traits, on="clip")
        parts.append(part.replace({"intensity": INTENSITIES}).assign(fold=int(cfg.folds), seed=cfg.seed))
    return pd.concat(parts).sort_values(["seed", "clip"], ignore_index=True)


def ensemble(table):
    """Pool the seeds of each fold: a row per fold and clip."""
    return pd.concat(pool([rows for _, rows in part.groupby("seed")]) for _, part in table.groupby("fold"))


def resampled(clusters, names=None, draws=2000):
    """How often each row counts when whole clusters (N,) are drawn with replacement: (draws, N).

    Tables with the same cluster `names`, by default those that occur, share their draws.
    """
    names = np.unique(clusters if names is None else names)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    return counts[:, np.searchsorted(names, clusters)].astype(np.float32)


def weighted_uar(weights, table):
    """The UAR of a predictions table (N rows) under each row of weights (draws, N): (draws,)."""
    true = table["true"].to_numpy(dtype=object)[:, None] == np.array(classes_of(table), object)  # (N, C)
    right = true & (table["predicted"] == table["true"]).to_numpy()[:, None]
    counts = weights @ true
    return np.nanmean(np.where(counts > 0, weights @ right / np.maximum(counts, 1), np.nan), axis=1)


def uar_of(table):
    """The UAR of a predictions table."""
    return recall(table["true"], table["predicted"])


def voices_of(table):
    """What a bootstrap draws, for each row of a table: its actor, its clip where no actor is named."""
    return table["actor"].where(table["actor"] != "", table["clip"])


def unseen_actors(actors):
    """The actors that are validation in no fold, so that no choice has heard them."""
    chosen_on = (fold_actors(actors, fold)[0] for fold in range(min(5, len(actors))))
    return sorted(set(actors).difference(*chosen_on))


def figures_of(table, draws, unseen):
    """All figures of one row from its pooled predictions and its test UAR in bootstrap draws (draws,)."""
    splits = {split: table[table["split"] == split] for split in SPLITS if split in set(table["split"])}
    test = splits["test"]
    by_run = test.groupby(["fold", "seed"])[["true", "predicted"]].apply(uar_of)
    by_fold, by_seed = (by_run.groupby(level=level).mean() for level in (0, 1))
    wrong = test[test["true"] != test["predicted"]]
    wrong = wrong.assign(confidence=wrong[classes_of(wrong)].max(axis=1).round(3)).nlargest(10, "confidence")
    fresh = test[test["actor"].isin(unseen)]
    return {
        "uar": float(by_run.mean()), "interval": np.quantile(draws, (0.025, 0.975)).tolist(),
        "by_fold": {str(fold): float(uar) for fold, uar in by_fold.items()},
        "spread": {key: float(uars.std()) if len(uars) > 1 else None
                   for key, uars in (("folds", by_fold), ("seeds", by_seed))},
        "unseen": uar_of(fresh) if len(fresh) else None,
        "ece_if_perfect": calibration_error_if_perfect(probabilities_of(test), test["clip"]),
        "mistakes": wrong[["clip", "actor", "true", "predicted", "confidence"]].to_dict("records"),
        "by_actor": {str(actor): uar_of(rows) for actor, rows in test.groupby("actor")},
        "groups": {split: {group: uar_of(rows) for column in part.columns.intersection(["intensity", "sex"])
                           for group, rows in part.groupby(column)} for split, part in splits.items()},
        **{split: score_table(part) for split, part in splits.items()}}


def evaluate(runs, tables, reasons, audit, cfg):
    """Score every row on the predictions of all runs, pooled; writes metrics.json and config.json."""
    rows, draws, folder = {}, {}, Path(cfg.output_dir)
    unseen = unseen_actors(sorted(tables[0]["actor"].unique().tolist())) if cfg.split == "speaker" else []
    sentences = sorted(set().union(*(clips["transcript"] for clips in tables)))
    for old in folder.glob("predictions/*_out_of_fold.csv"):
        old.unlink()
    for name in rows_of(cfg):  # those with one modality missing come last
        row, oracle = ROWS[name], reads_oracle(name, cfg)
        part = row.parts[0] if row.how == "ensemble" else name
        why = next((each[part] for each in reasons if each[part]), "")
        rows[name] = {"title": row.title + " (oracle text)" * oracle,
                      "status": f"not run: {why}" if why else "run"}
        if why:
            continue
        table = pooled(part, runs, tables)
        table = table if name == part else ensemble(table)
        test, draws[name] = table[table["split"] == "test"], {}
        for by_sentence in {oracle, cfg.use_simulated_sentences}:  # a pair of rows needs the same draws
            weights = resampled(voices_of(test))
            weights = weights * resampled(test["transcript"], sentences) if by_sentence else weights
            draws[name][by_sentence] = weighted_uar(weights, test)
        rows[name] |= figures_of(table, draws[name][oracle], unseen)
        if len(runs) > 1:
            save_table(file_of(cfg, "out_of_fold", name), test, cfg)
    pairs = []
    for first, second in itertools.combinations(draws, 2):
        oracle = reads_oracle(first, cfg) or reads_oracle(second, cfg)
        low, high = np.quantile(draws[first][oracle] - draws[second][oracle], (0.025, 0.975))
        difference = rows[first]["test"]["uar"] - rows[second]["test"]["uar"]
        pairs.append({"row": first, "against": second, "difference": difference, "difference_low": low,
                      "difference_high": high})
    alone = {name: rows.pop(name) for name in list(rows) if ROWS[name].how in ("audio", "text")}
    before = {}
    with contextlib.suppress(UserError, LookupError, TypeError):
        before = read_back(folder / "metrics.json")["rows"]
    if before != rows:  # no report may pass for that of these figures
        for old in {folder / REPORT, *folder.glob("plots/*.png")}.difference(plot_paths({}, cfg)):
            old.unlink(missing_ok=True)
    figures = described(cfg) | {"classes": classes_of(tables[0]), "audit": audit, "rows": rows,
                                "alone": alone, "pairs": pairs, "unseen_actors": unseen}
    save(folder / "metrics.json", figures)
    save(folder / "config.json", described(cfg))
    for heading, table in result_tables(figures, len(runs) > 1).items():
        print(f"\n{heading} ({'; '.join(marks(cfg)) or 'unseen speakers'})\n{table.to_string(index=False)}")


def result_tables(figures, several):
    """The figures of all rows as DataFrames of strings by heading; what did not run says why in `note`."""
    tables = {"Training and validation": [], "Test": [], "Test UAR over folds and seeds": []}
    for row in figures["rows"].values():
        cells = [{"note": row["status"]}] * 3
        if row["status"] == "run":
            train, held_out = row["train"], row["validation"]
            cells = [
                {"train acc": f"{train['accuracy']:.1%}", "val acc": f"{held_out['accuracy']:.1%}",
                 "val UAR": f"{held_out['uar']:.1%}", "val NLL": f"{held_out['nll']:.3f}"},
                test_cells(row),
                {"UAR": f"{row['uar']:.1%}", "95 % interval": "{:.1%} to {:.1%}".format(*row["interval"]),
                 **{f"SD {key}": "-" if value is None else f"{100 * value:.1f}"
                    for key, value in row["spread"].items()},
                 "unseen actors": f"{row['unseen']:.1%}" if row["unseen"] is not None else "-"}]
        for lines, line in zip(tables.values(), cells):
            lines.append({"model": row["title"]} | line)
    if not several:
        tables.popitem()
    rows, missing = figures["rows"] | figures["alone"], []
    for name, row in figures["rows"].items():
        if len(ROWS[name].parts) == 2 and row["status"] == "run":
            audio, text = (f"{name}_audio", f"{name}_text") if ROWS[name].kind else ROWS[name].parts
            keys = {"both": name, "audio only": audio, "text only": text}
            missing.append({"model": row["title"]} | {
                case: f"{rows[key]['uar']:.1%}" for case, key in keys.items()})
    tables |= {"Test UAR with one modality missing": missing} if missing else {}
    return {name: pd.DataFrame(lines).fillna("-") for name, lines in tables.items()}


def test_cells(row):
    """The test figures of a row as strings by heading."""
    test = row["test"]
    return {"UAR": f"{row['uar']:.1%}", "acc": f"{test['accuracy']:.1%}",
            "macro-F1": f"{test['macro_f1']:.1%}", "NLL": f"{test['nll']:.3f}",
            "ECE": f"{test['ece']:.3f}", "ECE if perfect": f"{row['ece_if_perfect']:.3f}"}


# %% 16. Plots
def plot_path(name, cfg):
    """Where a plot lies."""
    return Path(cfg.output_dir, "plots", f"{name}.png")


def plot_paths(rows, cfg):
    """The plots of a finished run, in the order of the report; those of the data first."""
    names = ["class_counts", "samples", *(["training_curves", "comparison", "reliability"] if rows else [])]
    names += ["cross_validation"] if rows and len(runs_of(cfg)) > 1 else []
    names += [f"confusion_{ROWS[name].stem}" for name in rows]
    return [plot_path(name, cfg) for name in names]


def save_figure(figure, path, cfg):
    """Save a figure with its marks below, show it in a notebook, close it; returns its path."""
    figure.supxlabel("; ".join(marks(cfg)), fontsize=8, color="firebrick")
    for axis in (axis for axis in figure.axes if not axis.has_data()):
        axis.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    if in_kernel():
        from IPython.display import Image, display
        display(Image(filename=str(path)))
    plt.close(figure)
    return path


def plot_counts(clips, cfg):
    """Clips per emotion in each split."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    sns.countplot(clips, x="emotion", hue="split", order=classes_of(clips), hue_order=SPLITS, ax=axis)
    for bars in axis.containers:
        axis.bar_label(bars, fontsize=8)
    title = f"Clips per emotion, {len(clips)} in all, {title_of_split(cfg).lower()}"
    axis.set(title=title, xlabel="", ylabel="clips")
    axis.legend(title="", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, plot_path("class_counts", cfg), cfg)


def plot_samples(clips, cfg):
    """One training clip per emotion, by one actor if possible: waveform above, log-mel spectrogram below."""
    lines = -(-len(classes_of(clips)) // 4)
    figure, axes = plt.subplots(2 * lines, 4, figsize=(13, 4.5 * lines), layout="constrained",
                                height_ratios=[1, 2] * lines)
    rows = clips[clips["split"] == "train"].sort_values(["actor", "clip"])
    rows = rows.drop_duplicates("emotion").set_index("emotion")
    for index, emotion in enumerate(classes_of(clips)):
        wave, spectrogram = axes[index // 4 * 2:, index % 4][:2]
        samples = load_audio(rows["path"][emotion], cfg.sampling_rate, cfg.trim_db)
        seconds = len(samples) / cfg.sampling_rate
        wave.plot(np.linspace(0, seconds, len(samples)), samples, linewidth=0.4)
        actor = str(rows["actor"][emotion])
        wave.set(title=emotion + f" (actor {actor})" * bool(actor), xlim=(0, seconds), xticks=[])
        mel = rows["mel"][emotion].astype(float).T  # (M, T)
        spectrogram.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(mel)))
        spectrogram.set_xlabel("seconds")
    for axis, label in zip(axes[:, 0], ("amplitude", "mel band") * lines):
        axis.set_ylabel(label)
    save_figure(figure, plot_path("samples", cfg), cfg)


def plot_curves(rows, cfg):
    """Loss and accuracy by epoch of every model that was trained, the mean of all runs."""
    names = [name for name in MODELS if name in rows]
    size = (max(5, 3.2 * len(names)), 5.6)
    figure, axes = plt.subplots(2, len(names), figsize=size, layout="constrained", squeeze=False)
    for name, pair in zip(names, axes.T):
        histories = [read_back(file_of(run, "history", name), pd.read_csv) for run in runs_of(cfg)]
        history = pd.concat(histories).groupby("epoch").mean(numeric_only=True)
        for axis, kind in zip(pair, ("loss", "accuracy")):
            axis.plot(history[f"train_{kind}"], ".-", label="training (disturbed clips)")
            axis.plot(history[f"validation_{kind}"], ".-", label="validation")
            axis.set(ylabel=kind if axis in axes[:, 0] else "")
        pair[0].set_title(rows[name]["title"], fontsize=9)
        pair[1].set(xlabel="epoch", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, plot_path("training_curves", cfg), cfg)


def plot_confusion(name, row, cfg):
    """The test confusion matrix of one row, as counts and as shares of the true emotion."""
    counts, classes = np.array(row["test"]["confusion"]), list(row["test"]["per_class"])
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    kinds = ("predictions", counts, "d"), ("% of the true emotion", shares, ".0f")
    for axis, (title, values, form) in zip(axes, kinds):
        sns.heatmap(values, annot=True, fmt=form, cmap="Blues", cbar=False, square=True, ax=axis,
                    xticklabels=classes, yticklabels=classes)
        axis.set(title=title, xlabel="predicted", ylabel="true")
        axis.tick_params(axis="x", rotation=45)
        axis.tick_params(axis="y", rotation=0)
    figure.suptitle("{title}: test accuracy {accuracy:.1%}, UAR {uar:.1%}".format(**row["test"] | row))
    return save_figure(figure, plot_path(f"confusion_{ROWS[name].stem}", cfg), cfg)


def draw_comparison(axis, rows, several):
    """UAR of all rows on validation and test, chance drawn in; of several runs also folds and interval."""
    table = pd.DataFrame([{"row": row["title"], "split": split, "UAR": 100 * part["uar"]}
                          for row in rows.values()
                          for split, part in (("validation", row.get("validation")), ("test", row)) if part])
    colors = {"validation": "lightsteelblue", "test": "steelblue"}
    sns.barplot(table, y="row", x="UAR", hue="split", ax=axis, palette=colors)
    for bars in axis.containers:
        axis.bar_label(bars, fmt="%.1f", fontsize=8, label_type="center")
    for place, row in enumerate(rows.values() if several else []):
        folds = [100 * uar for uar in row["by_fold"].values()]
        axis.plot([100 * end for end in row["interval"]], [place + 0.2] * 2, "k-", linewidth=1)
        axis.plot(folds, [place + 0.2] * len(folds), "k.", markersize=4)
    chance = 100 / max(len(row["test"]["per_class"]) for row in rows.values())
    axis.axvline(chance, color="firebrick", linestyle="--", label="chance")
    title = "UAR in %: mean (bar), each fold (dots), 95 % interval of the pooled UAR (line)"
    axis.set(xlim=(0, 101), xlabel="", ylabel="", title=title if several else "UAR in %")
    axis.legend(title="", loc="upper left", bbox_to_anchor=(1, 1))


def plot_comparison(rows, several, cfg):
    """All rows beside each other."""
    figure, axis = plt.subplots(figsize=(9.5, 1 + 0.55 * len(rows)), layout="constrained")
    draw_comparison(axis, rows, several)
    return save_figure(figure, plot_path("comparison", cfg), cfg)


def plot_reliability(rows, cfg):
    """How often each row is right on test clips, by its confidence; calibrated rows lie on the diagonal."""
    lines = -(-len(rows) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(13, 3.2 * lines), layout="constrained", sharex=True,
                                sharey=True, squeeze=False)
    for axis, row in zip(axes.flat, rows.values()):
        bins = np.array(row["test"]["reliability"])
        counts, confidence, right = bins[:, bins[0] > 0]
        axis.plot([0, 1], [0, 1], color="firebrick", linestyle="--", linewidth=1)
        axis.plot(confidence / counts, right / counts, "-", color="steelblue")
        axis.scatter(confidence / counts, right / counts, 4 + 200 * counts / counts.sum(), color="steelblue")
        axis.set_title(f"{row['title']}\nECE {row['test']['ece']:.3f}", fontsize=9)
        axis.set_xlabel("confidence", fontsize=8)
        axis.tick_params(labelbottom=True)
    figure.supylabel("share of right answers (area: share of clips)", fontsize=9)
    return save_figure(figure, plot_path("reliability", cfg), cfg)


def plot_cross_validation(rows, pairs, cfg):
    """One page: UAR with intervals, recall by emotion, UAR by actor, and the differences between rows."""
    figure, axes = plt.subplots(4, 1, figsize=(11, 5 + 1.5 * len(rows)), layout="constrained")
    draw_comparison(axes[0], rows, True)
    titles, actors = zip(*((row["title"], row["by_actor"]) for row in rows.values()))
    recalls = [{emotion: figures["recall"] for emotion, figures in row["test"]["per_class"].items()}
               for row in rows.values()]
    for axis, title, shares in zip(axes[1:], ("Recall by emotion", "UAR by actor"), (recalls, actors)):
        shares = 100 * pd.DataFrame(shares, titles)
        sns.heatmap(shares, annot=True, fmt=".0f", cmap="Blues", cbar=False, ax=axis)
        axis.set(title=f"{title} in %")
    gaps, texts = (pd.DataFrame(fill, list(rows), list(rows)) for fill in (0.0, ""))
    for pair in pairs:
        star = "*" * (pair["difference_low"] > 0 or pair["difference_high"] < 0)
        for sign, cell in ((1, (pair["row"], pair["against"])), (-1, (pair["against"], pair["row"]))):
            gaps.loc[cell] = 100 * sign * pair["difference"]
            texts.loc[cell] = f"{gaps.loc[cell]:+.1f}{star}"
    sns.heatmap(gaps, annot=texts, fmt="", cmap="RdBu", center=0, cbar=False, ax=axes[3], yticklabels=titles)
    axes[3].set(title="Difference in pooled UAR, row minus column (*: its paired 95 % interval leaves out 0)")
    axes[3].set_xticklabels(titles, rotation=30, ha="right")
    save_figure(figure, plot_path("cross_validation", cfg), cfg)


# %% 17. Report
REPORT = "emotion_recognition_report.docx"
DOCX_ADVICE = "pip install python-docx, then --phase report makes it"


def has_docx():
    """Whether python-docx, without which there is no report, is installed."""
    return importlib.util.find_spec("docx") is not None


def say_report(cfg):
    """Say where the report lies, or how to make it."""
    path = Path(cfg.output_dir, REPORT)
    print(f"Report: {path}" if has_docx() else f"{path} is left out: {DOCX_ADVICE}")


def meaning(cfg, classes):
    """What the figures mean, and what they do not, as sentences."""
    foreign = cfg.phase == "evaluate"
    sentences = {
        "UAR is the mean of the recalls of the emotions that occur; guessing gives "
        f"{100 / len(classes):.1f} %.": True,
        "Nobody who speaks in the test split was heard in training, unless this report says that speakers "
        "are shared.": not foreign,
        "One fold tests a fifth of the actors, and figures move by ten points and more from one set of "
        "actors to the next: compare systems over all five folds, never on one.":
            cfg.split == "speaker" and not foreign,
        "Temperatures are fitted on the validation split, so its NLL and ECE flatter a little. The test "
        "split is scored by the final models and decides nothing.": not foreign,
        "Temperatures and fusion weights are those of the training; nothing was fitted on these clips. "
        "Probabilities are renormalised over the emotions that both know.": foreign,
        "Simulated sentences are drawn by label. Rows that read them show how text and fusion work, not how "
        "well words tell feelings.": cfg.use_simulated_sentences,
        "The two sentences that RAVDESS's actors speak are the same in every emotion. RAVDESS holds acted "
        "speech of 24 North American speakers.": not cfg.manifest,
        "Nothing here measures what a person feels, and nothing here is fit for judging people.": True,
        "Corpus: Livingstone S. R., Russo F. A. (2018), The Ryerson Audio-Visual Database of Emotional "
        "Speech and Song (RAVDESS), PLoS ONE 13(5): e0196391, licence CC BY-NC-SA 4.0.": not cfg.manifest,
        f"Corpus: the clips of {cfg.manifest}.": bool(cfg.manifest)}
    return [sentence for sentence, holds in sentences.items() if holds]


def printable(text):
    """A text with a question mark for every character that XML does not admit."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def add_table(document, table):
    """Append a DataFrame to a docx document, in small print, columns as wide as their longest text asks."""
    from docx.shared import Cm, Pt
    grid = document.add_table(0, len(table.columns), "Light Grid Accent 1")
    lines = [[str(value) for value in line] for line in (table.columns, *table.itertuples(index=False))]
    lengths = [7 + min(28, max(map(len, column))) for column in zip(*lines)]
    for line in lines:
        for cell, value in zip(grid.add_row().cells, line):
            cell.paragraphs[0].add_run(printable(value)).font.size = Pt(8)
    for column, length in zip(grid.columns, lengths):
        column.width = Cm(17 * length / sum(lengths))
    document.add_paragraph()  # tables that touch become one


def write_document(title, sections, plots, figures, cfg):
    """Write the report as .docx, with the marks of this run on every page.

    `sections` maps headings to lists of sentences (bullet points), DataFrames, and Paths of pictures.
    """
    import docx
    from docx.shared import Cm
    document = docx.Document()
    page = document.sections[0]
    page.left_margin = page.right_margin = Cm(2)
    page.header.paragraphs[0].text = printable(
        "; ".join(marks(cfg)) or f"{Path(cfg.manifest).name or 'RAVDESS'}, unseen speakers")
    document.add_heading(printable(title), 0)
    sections = sections | {
        "Plots": plots,
        "What the figures mean, and what they do not": meaning(cfg, figures["classes"]),
        "How to repeat this": [figures["command"], str(figures["versions"])],
        "Settings": [pd.DataFrame(figures["settings"].items(), columns=["setting", "value"])]}
    for heading, parts in sections.items():
        document.add_heading(heading, 1)
        for part in parts:
            if isinstance(part, pd.DataFrame):
                add_table(document, part if len(part) else pd.DataFrame({"none": []}))
            elif isinstance(part, Path):
                document.add_picture(str(part), width=Cm(17))
            else:
                document.add_paragraph(printable(part), "List Bullet")
    with replacing(Path(cfg.output_dir, REPORT)) as temporary:
        document.save(temporary)


def write_report(figures, rows, study, cfg):
    """Write the report as .docx from what the other stages left, the figures of `rows` that ran above all."""
    several, best = len(runs_of(cfg)) > 1, max(rows, key=lambda name: rows[name]["validation"]["uar"])
    shown = [name for name in rows if name in ("cnn", best)]
    groups = [{"model": row["title"]} | {group: f"{uar:.1%}" for group, uar in row["groups"]["test"].items()}
              for row in rows.values()]
    sentence = "{title}: {uar:.1%} UAR, {accuracy:.1%} accuracy on {clips} test predictions{note}."
    notes = {best: " (best row on validation)"}
    summary = [sentence.format(note=notes.get(name, ""), **rows[name]["test"] | rows[name]) for name in shown]
    sections = {"Summary": summary + [f"Mind: {mark}." for mark in figures["marks"]],
                "Data and split": figures["audit"],
                **{heading: [table] for heading, table in result_tables(figures, several).items()}}
    if "bert" in rows:
        sections["Test"].insert(0, f"Text encoder of the BERT rows: {cfg.bert_model}.")
    if several:
        sections["Test UAR over folds and seeds"] += [
            f"Folds {cfg.folds}, {cfg.runs} run(s) of each, seeds from {cfg.seed}. UAR is the mean over "
            "folds and seeds; SD: standard deviation over one of them.",
            "The interval is a bootstrap of the pooled test predictions: actors are drawn with replacement, "
            "2000 times; in rows that read simulated sentences, sentences too.",
            "Unseen actors are validation in no fold, no choice has heard them: "
            f"{figures['unseen_actors'] or 'none'}."]
        sections["Paired differences in pooled UAR, in points, with their 95 % intervals"] = [pd.DataFrame([
            {"row": rows[pair["row"]]["title"], "against": rows[pair["against"]]["title"],
             "difference": points(pair, "difference")} for pair in figures["pairs"]])]
    if study is not None:
        sections["How reliable must words be before fusion helps?"] = study_section(study, cfg)
    if len(groups[0]) > 1:
        sections["Test UAR by intensity and sex"] = [pd.DataFrame(groups)]
    for row in (rows[name] for name in shown):
        by_emotion = pd.DataFrame(row["test"]["per_class"]).T.round(3).rename_axis("emotion")
        sections[f"{row['title']}: test results by emotion, and the most confident mistakes"] = [
            by_emotion.reset_index(), pd.DataFrame(row["mistakes"])]
    write_document("Speech emotion recognition: report", sections, plot_paths(rows, cfg), figures, cfg)


# %% 18. The study: how reliable must words be before fusion helps?
NOISES = 0.0, 0.25, 0.5, 0.75, 1.0
STUDY = "study.csv"


def study_settings(cfg):
    """`cfg` itself, then in --phase study a copy for each other share of SENTENCE_NOISE, with its folder."""
    levels = [cfg]
    for noise in sorted({*NOISES} - {cfg.sentence_noise}) if cfg.phase == "study" else ():
        named = {"phase": "all", "fusion": "both", "sentence_noise": noise,
                 "output_dir": f"{cfg.output_dir}/noise_{noise}"}
        levels.append(SimpleNamespace(**vars(cfg) | named | {"given": sorted({*cfg.given, *named})}))
    return levels


def share_audio(source, target):
    """Copy the AudioCNN of one level's runs to those of another: noise in the words does not concern it."""
    for run, other in zip(runs_of(source), runs_of(target)):
        for kind in RESULTS if out_of_date(other, "cnn") and not out_of_date(run, "cnn") else ():
            save(file_of(other, kind, "cnn"), file_of(run, kind, "cnn").read_bytes())  # the checkpoint last


def study_table(levels):
    """The figures of all levels of noise: a line per level, text model and row, with differences.

    `minus_audio` is the pooled test UAR minus that of AudioCNN, _low and _high end its paired 95 % interval;
    the same against the text model and against the mean of probabilities.
    """
    lines = []
    for cfg in levels:
        figures = read_back(Path(cfg.output_dir, "metrics.json"))
        rows = {name: row for name, row in (figures["rows"] | figures["alone"]).items() if "uar" in row}
        gaps = {(pair["row"], pair["against"]): [pair[f"difference{end}"] for end in ("", "_low", "_high")]
                for pair in figures["pairs"]}
        gaps |= {(second, first): (-gap, -high, -low) for (first, second), (gap, low, high) in gaps.items()}
        texts = [text for text in ("rnn", "bert") if {text, "cnn"} <= set(rows)]
        for text, (name, row) in itertools.product(texts, rows.items()):
            if name == "cnn" or text in name.split("_"):
                line = {"noise": cfg.sentence_noise, "text_model": ROWS[text].title, "row": name,
                        "title": ROWS[name].title, "text_uar": rows[text]["uar"], "uar": row["uar"],
                        "low": row["interval"][0], "high": row["interval"][1],
                        "sd_folds": row["spread"]["folds"], "ece": row["test"]["ece"],
                        "nll": row["test"]["nll"], "chance": 1 / len(row["test"]["per_class"])}
                for key, other in (("audio", "cnn"), ("text", text), ("mean", f"late_{text}")):
                    ends = (f"minus_{key}", f"minus_{key}_low", f"minus_{key}_high")
                    line |= zip(ends, gaps.get((name, other), [math.nan] * 3))
                lines.append(line)
    if not lines:
        raise UserError("--phase study compares words with sound: add cnn and rnn or bert to --run-models")
    return pd.DataFrame(lines).sort_values(["text_model", "noise"], kind="stable", ignore_index=True)


def read_study(rows, cfg):
    """The table of a study whose figures are those of these rows, or None."""
    path = Path(cfg.output_dir, STUDY)
    table = read_back(path, pd.read_csv) if path.exists() else pd.DataFrame({"noise": [], "row": []})
    mine = table[(table["noise"] == cfg.sentence_noise) & table["row"].isin(rows)]
    same = len(mine) and np.allclose(mine["uar"], [rows[row]["uar"] for row in mine["row"]], atol=1e-5)
    return table if same else None


def points(line, key):
    """A difference of a study or of a pair in points, with its interval: +1.2 (-0.3 to +2.7)."""
    gap, low, high = (f"{round(100 * line[key + end], 1) + 0.0:+.1f}" for end in ("", "_low", "_high"))
    return f"{gap} ({low} to {high})"


def study_findings(table):
    """What the study found, as sentences, for each text model."""
    sentences = []
    for model, part in table.groupby("text_model"):
        part = part.assign(title=part["title"].str.replace(f", {model.removeprefix('Text')}", ""))
        sound, name = part.loc[part["row"] == "cnn", "uar"].mean(), part["row"].str.split("_")
        fused, alone = (part[name.str[0].isin(FUSIONS) & (name.str.len() == size)] for size in (2, 3))
        by_text = fused["text_uar"] > sound  # words are the better single modality
        fused = fused.assign(rival=np.where(by_text, "minus_text", "minus_audio"),
                             gain=np.where(by_text, fused["minus_text"], fused["minus_audio"]))
        best, useless = fused.loc[fused["gain"].idxmax()], fused[fused["noise"] == fused["noise"].max()]
        surely = fused[fused["minus_audio_low"] > 0].groupby("title", sort=False)["text_uar"].min()
        starts = [f"{uar:.1%} ({', '.join(titles)})" for uar, titles in surely.groupby(surely).groups.items()]
        start = f"once words alone reach {' or '.join(starts)}" if starts else "at no level of noise"
        moves = ", ".join(f"{line['title']} {points(line, 'minus_audio')}" for _, line in useless.iterrows())
        floors = fused.groupby("title")["gain"].min().sort_values(ascending=False)
        floor = ", ".join(f"{title} {100 * gain:+.1f}" for title, gain in floors.items())
        alone = alone[alone["noise"] == alone["noise"].min()]
        losses = [f"{line['title']} {points(line, 'minus_' + line['row'].split('_')[-1])}"
                  for _, line in alone.iterrows()]
        sentences += [f"{model}: {sentence}." for sentence in (
            f"fusion gains most where words alone reach {best['text_uar']:.1%} UAR and sound alone "
            f"{sound:.1%}: {best['title']} then reaches {best['uar']:.1%}, {points(best, best['rival'])} "
            "points from the better of the two",
            f"fusion is surely better than sound alone, its interval above 0, {start}",
            f"words that are worth nothing ({useless['text_uar'].iloc[0]:.1%} alone, chance "
            f"{useless['chance'].max():.1%}) change the answers of sound by these points: {moves}",
            f"the safest choice is {floors.index[0]}. Each at the level that suits it least, in points from "
            f"the better of sound and words: {floor}",
            "where a modality is missing, one model for all cases is so many points from the model that "
            f"never had it: {', '.join(losses) or 'no early fusion was trained'}")]
    return sentences


def plot_study(table, cfg):
    """UAR of each row against that of its words alone, a panel per text model; bands: SD over folds."""
    models = table["text_model"].unique()
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 5.5), layout="constrained",
                                sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models):
        part = table[(table["text_model"] == model) & ~table["row"].str.endswith(("_audio", "_text"))]
        for title, line in part.groupby("title", sort=False):
            line = line.sort_values("text_uar")
            x, y, deviation = (100 * line[key] for key in ("text_uar", "uar", "sd_folds"))
            axis.plot(x, y, "o-", markersize=3, label=title)
            axis.fill_between(x, y - deviation, y + deviation, alpha=0.08)
        axis.axhline(100 * part["chance"].max(), color="firebrick", linestyle="--", label="chance")
        axis.set(title=model, xlabel=f"test UAR of {model} alone in %, by noise in sentences", ylim=(0, 101))
        axis.legend(fontsize=8, loc="lower right")
    axes[0, 0].set_ylabel("test UAR in %; band: standard deviation over folds")
    save_figure(figure, plot_path("study", cfg), cfg)


def study_section(table, cfg):
    """The part of the report on the study: findings, plot, table."""
    lines = [{"noise": line["noise"], "words alone": f"{line['text_uar']:.1%}", "row": line["title"],
              "UAR": f"{line['uar']:.1%}", "ECE": f"{line['ece']:.3f}",
              **{f"minus {key}": points(line, f"minus_{key}") for key in ("audio", "text", "mean")
                 if not math.isnan(line[f"minus_{key}"])}} for line in table.to_dict("records")]
    return [*study_findings(table), "Differences are of pooled test UAR, intervals at 95 %, paired: actors "
            "and sentences are drawn with replacement, the same for both rows.",
            plot_path("study", cfg), pd.DataFrame(lines).fillna("-")]


# %% 19. Prediction on one's own recordings
LONGEST = 6.0  # seconds of speech for which one window stands, as in training
NO_SPEECH = "no speech"
RECORDINGS = {*AUDIO_SUFFIXES, *".m4a .aac .opus .aif .aiff .au .caf .wma .webm .mp4".split()}


def read_any(path):
    """Samples (n,) and their rate in Hz of whatever soundfile or librosa can read. Raises AudioError."""
    try:
        return read_audio(path)
    except AudioError as error:
        import librosa
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return librosa.load(path, sr=None)
        except Exception:  # each of its backends has its own
            raise error from None


def downmix(recording, sampling_rate):
    """An array of one or more channels as float32 samples (n,), and its rate. Raises UserError."""
    samples, rate = np.asarray(recording), sampling_rate or 0
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf" or not 1 <= rate < math.inf:
        raise UserError("a recording is a path, or an array of numbers of shape (n,), (n, channels) or "
                        "(channels, n) with its sampling_rate in Hz")
    scale = 1.0 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = scale if samples.dtype.kind == "u" else 0.0  # of 8-bit samples, 128
    samples = samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim == 2 else samples
    return ((samples - middle) / scale).astype(np.float32), int(rate)


@contextlib.contextmanager
def only_warning():
    """Say what went wrong and go on, since an answer can still be given."""
    try:
        yield
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


class Predictor:
    """The trained models of a folder, with nothing but their checkpoints, ready for any recording.

    Raises UserError when the folder holds no AudioCNN, AudioError when a recording cannot be read.
    """

    def __init__(self, output_dir="outputs", device="cpu"):
        folder = SimpleNamespace(output_dir=output_dir, device=device)
        path, runs = file_of(folder, "checkpoint", "cnn"), sorted(Path(output_dir).glob("fold_*_seed_*"))
        several = []
        with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
            saved = read_back(Path(output_dir, "metrics.json"))["settings"]
            several = runs_of(SimpleNamespace(**saved))[1:]  # a single one beside them is older
        if runs and (several or not path.exists()):
            raise UserError(f"{output_dir} holds several runs: name one of them, --output-dir {runs[0]}")
        self.checkpoint, self.device, self.loaded = read_checkpoint(path), pick_device(folder), {}
        self.classes = self.checkpoint["classes"]
        self.cfg = SimpleNamespace(**self.checkpoint["config"] | vars(folder), notes=[])
        self.heard = SimpleNamespace(**vars(self.cfg) | {"use_simulated_sentences": False})  # for marks
        self.trained = [name for name in MODELS if file_of(folder, "checkpoint", name).exists()]
        self.load("cnn")

    def predict(self, recording, sampling_rate=None, text=None):
        """A DataFrame with a line per model: `predicted`, a probability per emotion, `note`.

        `recording` is a path, or an array of samples with `sampling_rate` in Hz; `text` is what is said, for
        the models that read words: without, AudioCNN answers alone. The answer to silence is "no speech".
        """
        windows = self.listen(recording, sampling_rate)
        return self.summarize(windows, self.answers(windows, text))

    def predict_over_time(self, recording, sampling_rate=None):
        """A DataFrame with AudioCNN's answer to each window: `start`, `end` in s, `voiced` from 0 to 1."""
        windows = self.listen(recording, sampling_rate)
        return self.follow(windows, self.answers(windows))

    def load(self, name):
        """(model, checkpoint), read once. Raises UserError when it was not trained beside this AudioCNN."""
        if name not in self.loaded:
            path = file_of(self.cfg, "checkpoint", name)
            checkpoint, own = read_checkpoint(path), self.checkpoint["fingerprint"]
            mark = {key: own.get(key) for key in ("seed", "split", "folds")}
            for part in (part for part in MODELS[name].parts if part in self.trained):
                mark |= {f"{part} {key}": value for key, value in self.load(part)[1]["fingerprint"].items()}
            change = differences(checkpoint["fingerprint"], mark)
            if change or checkpoint["classes"] != self.classes:
                raise UserError(f"{path} was not trained with the models beside it "
                                f"({change or 'other classes'}): {TRAIN_AGAIN}")
            self.loaded[name] = restore_model(path).to(self.device), checkpoint
        return self.loaded[name]

    def listen(self, recording, sampling_rate=None):
        """Windows of a recording: start and end in s, share of frames with voice, log-mel; none of silence.

        Up to 6 s of speech are one window, of which ClipDataset cuts the middle as in training.
        """
        cfg, windows, is_file = self.cfg, [], isinstance(recording, (str, Path))
        sound = read_any(recording) if is_file else downmix(recording, sampling_rate)
        with contextlib.suppress(Silence):
            samples, offset = prepare_samples(*sound, cfg.sampling_rate, cfg.trim_db)
            mel = log_mel(samples, cfg)
            level = 10 * np.log10(np.exp(mel.astype(np.float32)).sum(axis=1))  # of each frame, in dB
            low, high = np.percentile(level, (10, 95))
            window, second = window_frames(cfg), cfg.sampling_rate / cfg.hop_length
            size = len(mel) if len(samples) <= LONGEST * cfg.sampling_rate else min(window, len(mel))
            starts = [*range(0, len(mel) - size, window // 2), len(mel) - size]
            voiced = level > level.max() - cfg.trim_db
            windows = [{"start": offset + start / second, "end": offset + (start + size) / second,
                        "voiced": float(voiced[start:start + size].mean()), "mel": mel[start:start + size],
                        "emotion": self.classes[0]} for start in starts
                       if high - low > 6 and len(mel) >= 16]  # no steady noise: clips of RAVDESS have 17 dB
        table = pd.DataFrame(windows, columns=["start", "end", "voiced", "mel", "emotion"])
        return table.astype({"emotion": pd.CategoricalDtype(self.classes)})

    def rows(self, with_words=True):
        """The names of the rows that can answer, AudioCNN first; without words it alone."""
        if not with_words:
            return ["cnn"]
        usable = []
        for name in self.trained:
            with only_warning():  # once: who does not fit is passed over from now on
                self.load(name)
                usable.append(name)
        self.trained = usable
        return usable + [name for name, row in ROWS.items() if set(row.parts) <= set(usable) and (
            row.how == "mean" or file_of(self.cfg, "weights", name).exists())]

    def source(self, name):
        """The checkpoint that says how a row was trained: its own, or that of its text model."""
        return self.load(name if name in MODELS else ROWS[name].parts[-1])[1]

    def score(self, clips, names):
        """Probabilities (N, C) by row, of clips or windows; parts stand before what is made of them."""
        found = {}
        for name in names:
            if name in MODELS:
                model, checkpoint = self.load(name)
                logits = predict(model, ClipDataset(clips, model, self.cfg, self.device))
                found[name] = (logits / checkpoint["temperature"]).softmax(dim=1).numpy()
            else:
                found[name] = fuse_late(name, found, self.cfg)
        return found

    def answers(self, windows, text=None):
        """Probabilities (W, C) by row of windows in which `text` is said; AudioCNN's if that is unknown."""
        if windows.empty:
            return {"cnn": np.zeros((0, len(self.classes)))}
        return self.score(windows.assign(transcript=text), self.rows(text is not None))

    def summarize(self, windows, answers):
        """The table of `predict` from windows, which count as much as there is voice in them."""
        lines = {}
        for name, probabilities in answers.items():
            values, found = np.full(len(self.classes), np.nan), NO_SPEECH
            if len(windows):
                values = np.average(probabilities, axis=0, weights=windows["voiced"])
                found = self.classes[values.argmax()]
            oracle = reads_oracle(name, SimpleNamespace(**self.source(name)["config"]))
            lines[ROWS[name].title] = {"predicted": found, **dict(zip(self.classes, values.tolist())),
                                       "note": "trained on simulated sentences" * oracle}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("model")

    def follow(self, windows, answers):
        """The table of `predict_over_time` from windows."""
        which = np.where(windows["voiced"] > 0, answers["cnn"].argmax(axis=1), -1)
        found = np.array([*self.classes, NO_SPEECH])[which]
        columns = pd.DataFrame(answers["cnn"], windows.index, self.classes)
        return windows[["start", "end", "voiced"]].assign(predicted=found).join(columns)


def words_of(path, predictor, cfg):
    """What is said in a recording, None if nothing is known, and where that comes from."""
    if len(predictor.trained) == 1:
        return None, "no trained model reads words"
    if cfg.text:
        return printable(cfg.text), "--text"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "whisper")
    name = {"large": "large-v3", "turbo": "large-v3-turbo"}.get(cfg.whisper_model, cfg.whisper_model)
    if not (Path(name).is_file() or (cache / f"{name}.pt").exists()):
        return None, "no --text, and no weights of Whisper here: audio alone"
    if "whisper" not in predictor.loaded:
        predictor.loaded["whisper"] = load_whisper(name, predictor.device, "say with --text what is said")
    whisper, model = predictor.loaded["whisper"]
    wave = prepare_samples(*read_any(path), 16000, math.inf)[0]
    return write_down([wave], whisper, model)[0], f"Whisper {cfg.whisper_model}"


def describe_recording(path, name, predictor, cfg):
    """All answers for one recording, as builtins; a long one leaves a table and a plot of its windows."""
    try:
        windows = predictor.listen(path)
        text, source = words_of(path, predictor, cfg) if len(windows) else (None, "")
    except AudioError as error:
        return {"recording": name, "error": str(error), "models": []}
    answers, over_time = predictor.answers(windows, text), ""
    summary, course = predictor.summarize(windows, answers), predictor.follow(windows, answers)
    if len(windows) > 1:
        plain = re.sub(r"[^\w.-]", "_", name)[-100:]  # a/b.wav and a_b.wav must not share a file
        mark = "" if plain == name else f"-{digest(name)[:6]}"
        table = Path(cfg.output_dir, "recordings", f"{plain}{mark}.csv")
        with only_warning():
            save_table(table, course, predictor.heard)
            plot_over_time(table.with_suffix(".png"), path, course, predictor)
            over_time = str(table)
    models = [{"model": title, "predicted": line["predicted"], "note": line["note"], "probabilities": {
        emotion: None if math.isnan(line[emotion]) else line[emotion] for emotion in predictor.classes}}
        for title, line in summary.to_dict("index").items()]
    return {"recording": name, "answer": models[0]["predicted"], "text": text, "text_source": source,
            "models": models, "windows": course.to_dict("records"), "over_time": over_time}


def plot_over_time(path, recording, course, predictor):
    """Waveform and AudioCNN's probabilities over time of a long recording."""
    samples, rate = read_any(recording)
    figure, (wave, areas) = plt.subplots(2, 1, figsize=(12, 6), layout="constrained", sharex=True)
    step = max(1, len(samples) // 20000)
    wave.plot(np.arange(len(samples))[::step] / rate, samples[::step], linewidth=0.4)
    wave.set(ylabel="amplitude")
    middles = (course["start"] + course["end"]) / 2
    areas.stackplot(middles, course[predictor.classes].T, labels=predictor.classes)
    areas.set(xlabel="seconds", ylabel="probability by AudioCNN", ylim=(0, 1))
    areas.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    save_figure(figure, path, predictor.heard)


def print_answer(answer):
    """One recording on the console: a bar per emotion by AudioCNN, then the other models."""
    print(f"\n{answer['recording']}: {answer.get('answer') or answer['error']}")
    if answer.get("answer", NO_SPEECH) == NO_SPEECH:
        return
    first, *others = answer["models"]
    for emotion, value in sorted(first["probabilities"].items(), key=lambda item: -item[1]):
        print(f"  {emotion:12} {value:6.1%}  {'#' * round(40 * value)}")
    for model in others:
        note = f" ({model['note']})" * bool(model["note"])
        print(f"  {model['model']}{note}: {model['predicted']} {max(model['probabilities'].values()):.1%}")
    print(f"  Words: {answer['text_source']}" + f": {answer['text']!r}" * (answer["text"] is not None))
    if answer["over_time"]:
        print(f"  Over time: {answer['over_time']} and .png beside it")


def recordings_in(cfg):
    """The files of --input, a recording or a folder of them. Raises UserError when there are none."""
    path = Path(cfg.input)
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob("*") if cfg.input and file.suffix.lower() in RECORDINGS
        and file.is_file() and not file.name.startswith("."))
    if not files:
        why = "holds no recordings" if path.exists() else "does not exist"
        raise UserError(f"--input {cfg.input!r} {why}: name a recording or a folder of them")
    return files


def predict_phase(cfg):
    """Answer for a recording or a folder of them, on the console and in OUTPUT_DIR/recordings."""
    path, files = Path(cfg.input), recordings_in(cfg)
    predictor = Predictor(cfg.output_dir, cfg.device)
    refuse_other_training(cfg, predictor)
    names = [printable(file.relative_to(path).as_posix() if path.is_dir() else file.name) for file in files]
    bar = tqdm(files, "Recordings", disable=len(files) < 2)
    answers = [describe_recording(file, name, predictor, cfg) for file, name in zip(bar, names)]
    if path.is_file() and "error" in answers[0]:
        raise UserError(f"{path} cannot be used ({answers[0]['error']}): name another --input")
    if path.is_dir():
        lines = [{"recording": answer["recording"], "error": answer.get("error", ""),
                  "model": model.get("model"), "predicted": model.get("predicted"),
                  **model.get("probabilities", {}), "note": model.get("note")}
                 for answer in answers for model in answer["models"] or [{}]]
        with only_warning():
            save_table(Path(cfg.output_dir, "recordings", "predictions.csv"), pd.DataFrame(lines),
                       predictor.heard)
    if cfg.json:
        print(json.dumps(answers if path.is_dir() else answers[0], indent=1))
        return
    for answer in answers:
        print_answer(answer)
    print("\n" + "; ".join([*marks(predictor.heard), "trained on acted speech: not fit for judging people"]))


# %% 20. The demo
DEMO_VOICES = {  # pitch and its range in semitones, syllables a second, level in dB, roughness, brightness
    "neutral": (0, 1, 4.0, -6, 0.00, 1.0), "calm": (-3, 1, 2.8, -12, 0.00, 0.6),
    "happy": (5, 6, 5.0, -2, 0.02, 1.6), "sad": (-2, 2, 2.6, -14, 0.05, 0.5),
    "angry": (4, 3, 5.2, 0, 0.35, 2.2), "fearful": (8, 3, 6.2, -6, 0.20, 1.2),
    "disgust": (-4, 4, 3.2, -5, 0.30, 1.0), "surprised": (9, 9, 4.2, -3, 0.02, 1.6),
}
VOWELS = np.array([[700, 1200, 2500], [400, 2000, 2600], [500, 900, 2400], [300, 2300, 3000]])  # in Hz


def synthesize(emotion, actor, rng, rate):
    """A speech-like synthetic clip, float samples (n,): harmonics with formants, five syllables, no words."""
    pitch, span, tempo, level, rough, bright = DEMO_VOICES[emotion]
    voice, male = random.Random(actor), actor % 2
    base = (115 if male else 205) * 2 ** ((voice.uniform(-2, 2) + pitch + rng.normal(0, 0.7)) / 12)
    tempo *= rng.uniform(0.9, 1.1)
    t = np.arange(int(rate * 5 / tempo)) / rate
    fall = 0.75 * t / t[-1] * (1 if emotion == "surprised" else -1)
    melody = span * (np.sin(2 * np.pi * tempo / 3 * t + rng.uniform(0, 6)) + fall)
    jitter = np.repeat(rng.normal(size=len(t) // 80 + 1), 80)[:len(t)]
    f0 = base * 2 ** (melody / 12) * (1 + rough * 0.1 * jitter)
    phase = np.cumsum(2 * np.pi * f0 / rate)
    scale = (1 if male else 1.16) * voice.uniform(0.95, 1.05)
    formants = scale * VOWELS[rng.integers(0, len(VOWELS), 9)][(t * tempo).astype(int)]  # (n, 3)
    wave = np.zeros_like(t)
    for harmonic in range(1, 25):
        distance = (harmonic * f0[:, None] - formants) / 180
        strength = (0.03 + np.exp(-distance**2 / 2).sum(axis=1)) * harmonic ** (-1.2 / bright)
        wave += np.sin(harmonic * phase) * strength
    wave += rough * rng.normal(size=len(t)) * np.abs(wave)
    wave *= np.sin(np.pi * (t * tempo % 1)) ** 0.7
    wave = np.pad(wave / np.abs(wave).max() * 10 ** (level / 20), rate // 5)
    return 0.9 * wave + rng.normal(0, 3e-4, len(wave))


def write_demo_corpus(folder, actors=range(1, 25), statements=(1, 2)):
    """Write synthetic clips under RAVDESS names, one per actor, emotion and statement, if missing."""
    def write(name):
        """Write the clip of one RAVDESS name."""
        path, emotion = Path(folder, f"Actor_{name[-2:]}", f"{name}.wav"), EMOTIONS[int(name[6:8]) - 1]
        if not path.exists():
            rng = np.random.default_rng(int(name.replace("-", "")))
            with replacing(path) as temporary:
                soundfile.write(temporary, synthesize(emotion, int(name[-2:]), rng, 16000), 16000, "PCM_16")
    in_parallel(write, [f"03-01-{emotion:02}-01-{statement:02}-01-{actor:02}" for actor in actors
                        for emotion in range(1, 9) for statement in statements], "Synthetic clips")


def write_demo_encoder(folder):
    """Write a small, untrained DistilBERT that knows the words of the sentence bank, in the usual layout."""
    if Path(folder, "model.safetensors").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
    transformers = load_transformers()
    import tokenizers
    words = sorted(set(words_in(" ".join(itertools.chain(*sentence_bank().values())))))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    ids = {token: index for index, token in enumerate([*special.values(), *".,?!'", *words])}
    tokenizer = tokenizers.BertWordPieceTokenizer(ids, lowercase=True)._tokenizer
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(ids), dim=64, n_layers=2, n_heads=4, hidden_dim=128)
    with replacing(folder) as temporary:
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(temporary)
        transformers.DistilBertModel(config).save_pretrained(temporary)


# %% 21. The phases and main
def reuse(title, key, files, cfg, make):
    """Make files unless they are there, made under the same key; a notebook sees its figures every time."""
    path = Path(cfg.output_dir, "cache", f"{title.replace(' ', '_')}.key")
    there = path.exists() and path.read_text() == key and all(file.exists() for file in files)
    if there and not in_kernel() and cfg.phase != "report":
        print(f"Reused: {title}")
        return
    path.unlink(missing_ok=True)  # whoever is killed in `make` leaves files of two kinds
    make()
    save(path, key.encode())


def data_phase(clips, cfg, device):
    """Split and transcribe clips that have features: the table of one run, with all its columns."""
    clips = split_clips(clips, cfg)
    if "transcript" not in clips:  # a manifest may have its own
        clips = add_transcripts(clips, cfg, device)
    save_table(Path(cfg.output_dir, "clips.csv"), clips.drop(columns="mel"), cfg)
    return clips


def describe_data(runs, tables, audit, cfg):
    """Write the audit, the label encoder and the plots of the data; returns the audit as sentences."""
    from sklearn.preprocessing import LabelEncoder
    sentences, folder, clips = describe_audit(tables[0], audit), Path(cfg.output_dir), tables[0]
    sentences += dict.fromkeys(describe_split(table, run) for run, table in zip(runs, tables))
    sentences += describe_transcripts(clips) if asks_whisper(cfg) else []
    print("\n".join(sentences))
    save(folder / "audit.json", {"audit": sentences, "marks": marks(cfg)})
    encoder = LabelEncoder()
    encoder.classes_ = np.array(classes_of(clips))  # fit() would sort them
    save(folder / "label_encoder.pkl", pickle.dumps(encoder))
    settings = {name: getattr(cfg, name) for name in FEATURES}
    key = digest(clips.drop(columns="mel").to_csv(), settings, marks(cfg))
    reuse("data plots", key, plot_paths({}, cfg), cfg,
          lambda: (plot_counts(clips, cfg), plot_samples(clips, cfg)))
    return sentences


def models_to_run(cfg):
    """The short names that this phase may train, in order; --phase fusion leaves out what no fusion needs."""
    asked = models_asked(cfg)
    fusions = [name for name in asked if MODELS[name].parts]
    needed = {key for name in fusions for key in (name, *MODELS[name].parts)}
    wanted = {"unimodal": set(asked).difference(fusions), "fusion": needed}.get(cfg.phase, asked)
    return [name for name in asked if name in wanted]


def check_needs(runs, names, cfg):
    """Find now what would stop the run after an hour: packages, encoder, disk. Raises UserError."""
    load_torchaudio()
    todo = {(run.output_dir, name) for run in runs for name in names if out_of_date(run, name)}
    encoders = sum("bert" in name for _, name in todo)  # that checkpoints hold; a training's state has four
    size = sum(p.numel() for p in load_text_encoder(cfg.bert_model)[2].parameters()) if encoders else 0
    if not has_docx():
        print(f"The .docx will be left out: {DOCX_ADVICE}")
    free, need = shutil.disk_usage(cfg.output_dir).free / 1e9, 0.3 + 5e-9 * size * (encoders + 8)  # 4 bytes
    if free < need:
        raise UserError(f"{cfg.output_dir} has {free:.1f} GB left of {need:.1f} needed: name another "
                        "--output-dir")


def epoch_seconds(name, clips, cfg, device, trained):
    """About how long an epoch of a unimodal model takes, from three training steps."""
    settings, path = settings_for(cfg, name), file_of(cfg, "checkpoint", name)
    model = (restore_model(path).to(device) if trained else build_model(name, clips, cfg, device)).train()
    train = ClipDataset(clips[clips["split"] == "train"], model, cfg, device, augment=True)
    trainer, rows = Trainer(model, settings, 10, device), list(range(len(train)))[:settings["batch_size"]]
    seconds = min(timeit.repeat(lambda: trainer.step(train[rows]), number=1, repeat=3))
    return seconds * len(train) / settings["batch_size"]


def plan_training(clips, names, cfg, device, following=0):
    """Say what will run, for how long, what is reused; returns the names to train. Raises UserError."""
    reasons = {name: out_of_date(cfg, name, clips) for name in MODELS}
    for name in names:
        for part in MODELS[name].parts:
            if part not in names and reasons[part]:
                raise UserError(f"{ROWS[name].title} needs {file_of(cfg, 'checkpoint', part)} "
                                f"({reasons[part]}): add {part} to --run-models")
    seconds = functools.cache(lambda part: epoch_seconds(part, clips, cfg, device, trained=not reasons[part]))
    precision, total = str(training_precision(device)).removeprefix("torch."), 0.0
    print(f"\nPlan: {device} in {precision}, {torch.get_num_threads()} threads, results in {cfg.output_dir}")
    for name in names:
        path, epochs, old = file_of(cfg, "checkpoint", name), settings_for(cfg, name)["epochs"], {}
        with contextlib.suppress(UserError):
            old = read_checkpoint(path)
        before = f"{old['epochs']} epochs, validation UAR {old['scores']['uar']:.1%}" if old else ""
        if not reasons[name]:
            state = file_of(cfg, "state", name)
            if state.exists() and state.stat().st_mtime <= path.stat().st_mtime:  # killed in its last moment
                state.unlink()
            print(f"  {ROWS[name].title:24} reused ({before})")
            continue
        share = 0.4 if MODELS[name].parts else 1.0  # a head needs no backward pass of its parts
        minutes = epochs * share * sum(map(seconds, MODELS[name].parts or [name])) / 60
        total += minutes
        print(f"  {ROWS[name].title:24} {epochs} epochs, about {minutes:.1f} min ({reasons[name]})"
              + (f"; replaces {before}, kept as *.previous.pth" if old else ""))
    print(f"  about {total:.0f} min of training in all"
          + f", and {following} more runs after this one" * bool(following), flush=True)
    return [name for name in names if reasons[name]]


def described(cfg):
    """How a run was made: the command that repeats it, its marks, settings and versions, as builtins."""
    flags = [flag_of(key, value) for key, value in settings_of(cfg).items() if key in cfg.given]
    return {"command": " ".join(["python emotion_recognition.py", *flags]), "marks": marks(cfg),
            "settings": settings_of(cfg), "versions": versions()}


FREE = "phase", "output_dir", "device", "download", "input", "text", "json"  # that shape no training


def refuse_other_training(cfg, predictor):
    """Raise a UserError when a flag that was given would have made another AudioCNN than that of a folder."""
    flags = {key: getattr(cfg, key) for key in cfg.given if key not in FREE}
    asked = SimpleNamespace(**vars(cfg) | vars(predictor.cfg) | flags)
    change = differences(predictor.checkpoint["fingerprint"], fingerprint(asked, "cnn"))
    if flags and change:
        given = ", ".join(flag_of(key, value) for key, value in flags.items())
        raise UserError(f"{given} contradicts {file_of(cfg, 'checkpoint', 'cnn')} ({change}): leave that out "
                        "or train with --phase all")


def report_phase(cfg):
    """Plots and .docx from what lies in OUTPUT_DIR alone; --phase report draws them in any case."""
    path = Path(cfg.output_dir, "metrics.json")
    figures = read_back(path)
    if not (isinstance(figures, dict) and {"rows", "pairs", "audit", "marks", "settings"} <= set(figures)):
        raise UserError(f"{path} is foreign: make it again with --phase all, or name another --output-dir")
    saved = figures["settings"]
    for key in (key for key in cfg.given if key not in FREE):
        value, other = getattr(cfg, key), saved.get(key)
        if value != other and Path(str(value)).absolute() != Path(str(other)).absolute():  # ./a is a
            raise UserError(f"{flag_of(key, value)} contradicts {path} ({other}): leave that flag out or "
                            "train with --phase all")
    cfg = SimpleNamespace(**vars(cfg) | {key: saved[key] for key in saved if key not in FREE})
    rows = {name: row for name, row in figures["rows"].items() if row["status"] == "run"}
    if not rows:
        raise UserError(f"no model in {path.parent} is trained: run --phase all or name another --output-dir")
    for missing in (plot for plot in plot_paths({}, cfg) if not plot.exists()):
        raise UserError(f"{missing} is missing: make it with --phase data")
    for run, name in itertools.product(runs_of(cfg), MODELS):
        if name in rows and (reason := out_of_date(run, name)):
            read_checkpoint(file_of(run, "checkpoint", name))  # has a sentence of its own where it is broken
            raise UserError(f"{path} is not of the models beside it ({ROWS[name].title}: {reason}): make it "
                            "again with --phase all")
    if read_back(Path(cfg.output_dir, "audit.json")) != {key: figures[key] for key in ("audit", "marks")}:
        raise UserError(f"{path} is not of the data beside it, audit.json: make it again with --phase all")
    study = read_study(rows, cfg)
    mark = digest(figures, has_docx(), "" if study is None else study.to_csv())
    files = plot_paths(rows, cfg) + [Path(cfg.output_dir, REPORT)] * has_docx()
    reuse("report", mark, files, cfg, lambda: draw_report(figures, rows, study, cfg))
    say_report(cfg)


def draw_report(figures, rows, study, cfg):
    """Draw the figures of `rows`, and write the .docx."""
    several = len(runs_of(cfg)) > 1
    figures["pairs"] = [pair for pair in figures["pairs"] if {pair["row"], pair["against"]} <= set(rows)]
    if study is not None:
        plot_study(study, cfg)
    plot_curves(rows, cfg)
    plot_comparison(rows, several, cfg)
    plot_reliability(rows, cfg)
    if several:
        plot_cross_validation(rows, figures["pairs"], cfg)
    for name, row in rows.items():
        plot_confusion(name, row, cfg)
    if has_docx():
        write_report(figures, rows, study, cfg)


def experiment(clips, audit, names, cfg, device):
    """Train and score all runs that the settings ask for; `clips` have features. --phase data ends early."""
    runs, reasons = runs_of(cfg), []
    tables = [data_phase(clips, run, device) for run in runs]  # first: a fold that cannot be ends it
    sentences = describe_data(runs, tables, audit, cfg)
    if cfg.phase == "data":
        return
    for number, (run, table) in enumerate(zip(runs, tables), 1):
        if len(runs) > 1:
            print(f"\n=== Run {number} of {len(runs)}: fold {run.folds}, seed {run.seed}")
        for name in plan_training(table, names, run, device, len(runs) - number):
            train_model(name, table, run, device)
        reasons.append(combine(table, run, device))
    evaluate(runs, tables, reasons, sentences, cfg)


def known_clips(clips, classes, cfg):
    """(the clips of a foreign corpus whose emotion the models know, all of them test; who is left out)."""
    shared = [emotion for emotion in classes if emotion in classes_of(clips)]
    if len(shared) < 2:
        raise UserError(f"{cfg.manifest} has {', '.join(shared) or 'no emotion'} in common with the models of"
                        f" {cfg.output_dir}, fewer than two of {', '.join(classes)}: see --manifest")
    counts = clips["emotion"].value_counts(sort=False).drop(shared)
    left_out = ", ".join(f"{emotion} {n}" for emotion, n in counts.items()) or "none"
    clips = clips[clips["emotion"].isin(shared)].assign(split="test")
    return (clips.astype({"emotion": pd.CategoricalDtype(shared)}),
            f"Emotions compared: {', '.join(shared)}. Clips left out, unknown to the models: {left_out}.")


def evaluate_phase(cfg):
    """Score the models of OUTPUT_DIR, as they were trained, on a foreign corpus; into a folder of its own."""
    predictor = Predictor(cfg.output_dir, cfg.device)
    refuse_other_training(cfg, predictor)
    own, here = predictor.checkpoint, Path(cfg.manifest).resolve()
    clips, audit = index_manifest(cfg.manifest)
    clips, shared = known_clips(clips, own["classes"], cfg)
    names = predictor.rows("transcript" in clips)
    sources = [marks(predictor.heard), *(predictor.source(name)["marks"] for name in names if name != "cnn")]
    folder = Path(cfg.output_dir, f"evaluation_{here.stem}")
    other = cfg.manifest
    with contextlib.suppress(UserError, LookupError, TypeError):
        other = read_back(folder / "metrics.json")["settings"]["manifest"]
    if here != Path(other).resolve():
        raise UserError(f"{folder} holds the figures of {other}: move it away, or rename {cfg.manifest}")
    notes = [f"models of {cfg.output_dir} on another corpus"]
    with contextlib.suppress(UserError, LookupError):  # nothing but checkpoints is needed
        mine = read_back(Path(cfg.output_dir, "clips.csv"), functools.partial(pd.read_csv, dtype=str))
        if known := clips["digest"].isin(mine.loc[mine["split"] != "test", "digest"]).sum():
            notes.append(f"{known} of these {len(clips)} clips are known from training: the figures flatter")
    notes += [f"in training: {mark}" for mark in dict.fromkeys(itertools.chain(*sources))]
    work = SimpleNamespace(**vars(predictor.cfg) | {
        "phase": "evaluate", "manifest": cfg.manifest, "given": cfg.given, "split": "speaker", "notes": notes,
        "output_dir": str(folder), "cache_dir": str(folder), "demo": False, "use_simulated_sentences": False})
    clips = add_features(clips, audit, work)
    sentences = [*describe_audit(clips, audit), shared]
    print("\n".join(sentences))
    for pattern in ("metrics.json", "plots/*.png", "predictions/*.csv", "*.docx"):
        for old in folder.glob(pattern):
            old.unlink()
    rows = {name: {"title": ROWS[name].title, "status": "run" if name in names else
                   f"not run: {cfg.manifest} has no column transcript"} for name in predictor.rows()}
    places, weights = list(map(own["classes"].index, classes_of(clips))), resampled(voices_of(clips))
    for name, probabilities in predictor.score(clips, names).items():
        shares = probabilities[:, places].clip(1e-7)
        table = predictions_table(clips, shares / shares.sum(axis=1, keepdims=True))
        save_table(file_of(work, "predictions", name), table, work)
        rows[name] |= figures_of(table.assign(fold=0, seed=0), weighted_uar(weights, table), [])
    figures = described(cfg) | {"marks": marks(work), "settings": settings_of(work), "audit": sentences,
                                "classes": classes_of(clips), "rows": rows}
    save(folder / "metrics.json", figures)
    report_foreign(figures, work)


def report_foreign(figures, cfg):
    """Table, plots and .docx of an evaluation on a foreign corpus."""
    ran = {name: row for name, row in figures["rows"].items() if row["status"] == "run"}
    table = pd.DataFrame([{"model": row["title"]} | (
        test_cells(row) | {"95 % interval": "{:.1%} to {:.1%}".format(*row["interval"])}
        if name in ran else {"note": row["status"]}) for name, row in figures["rows"].items()]).fillna("-")
    print(f"\nTest ({'; '.join(marks(cfg))})\n{table.to_string(index=False)}")
    plots = [plot_comparison(ran, False, cfg), plot_reliability(ran, cfg),
             *(plot_confusion(name, row, cfg) for name, row in ran.items())]
    if has_docx():
        write_document(f"Speech emotion recognition: {Path(cfg.manifest).name}",
                       {"Data": figures["audit"], "Test": [table]}, plots, figures, cfg)
    say_report(cfg)


@contextlib.contextmanager
def locked(cfg):
    """Keep other runs out of all folders that this one writes to, until it ends or is killed."""
    reads = cfg.phase in ("report", "evaluate")
    levels = study_settings(cfg) if Path(cfg.output_dir).exists() or not reads else []
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(run.output_dir for level in levels for run in [level, *runs_of(level)]):
            try:
                locks.enter_context(filelock.FileLock(Path(folder, "cache", "run.lock"), timeout=0))
            except filelock.Timeout:
                raise UserError(f"another run is at work in {folder}: wait until it ends or name another "
                                "--output-dir") from None
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error}): name another --output-dir") from error
        yield


def train_phases(cfg):
    """Train, combine, score and report what the settings ask for. Raises UserError."""
    device = pick_device(cfg)
    if cfg.manifest:
        clips, audit = index_manifest(cfg.manifest)
        adapt_settings(cfg, clips)
    names = models_to_run(cfg)
    if not names:
        raise UserError(cfg.no_words or
                        f"--run-models {cfg.run_models} leaves --phase {cfg.phase} nothing to do")
    if cfg.demo:
        metrics_file = Path(cfg.output_dir, "metrics.json")
        if metrics_file.exists() and "synthetic" not in metrics_file.read_text(encoding="utf-8"):
            raise UserError(f"{cfg.output_dir} holds a real run: name another --output-dir for --demo")
        with filelock.FileLock("archive/demo/run.lock"):  # a demo beside this one may be at it
            write_demo_corpus(cfg.ravdess_path)
            if "bert_model" not in cfg.given and "bert" in names:
                write_demo_encoder(cfg.bert_model)
    if cfg.download:
        download_corpus(cfg)
    corpus, levels = cfg.manifest or find_corpus(cfg), study_settings(cfg)
    if cfg.phase != "data":
        check_needs([run for level in levels for run in runs_of(level)], names, cfg)
    if not cfg.manifest:
        clips, audit = index_clips(corpus)
    clips = add_features(clips, audit, cfg)
    for level in levels:
        share_audio(cfg, level)
        experiment(clips, audit, names, level, device)
    if cfg.phase == "study":
        save_table(Path(cfg.output_dir, STUDY), study_table(levels), cfg)
    if cfg.phase in ("all", "study"):
        report_phase(cfg)


def main(argv=None):
    """Run the phases that the settings ask for; `argv` as on the command line. Raises UserError."""
    cfg = parse_settings(argv)
    plt.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
    sys.stderr = sys.stderr or io.StringIO()  # closed; tqdm would stumble
    if not in_kernel():
        plt.switch_backend("agg")
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # consoles that know few letters
    phases = {"report": report_phase, "predict": predict_phase, "evaluate": evaluate_phase}
    with contextlib.nullcontext() if cfg.phase == "predict" else locked(cfg):  # that changes no result
        phases.get(cfg.phase, train_phases)(cfg)


# %% 22. Run
if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt) as stop:
        sentence = str(stop) or "stopped; what is finished is kept"
        if in_kernel():
            raise UserError(sentence) from None
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 2)
