# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.12",
#     "torchaudio>=2.6,<2.12",
#     "transformers>=4.50",
#     "librosa>=0.10.2",
#     "openai-whisper>=20250625",
#     "numpy>=1.26",
#     "pandas>=2.2.1",
#     "scikit-learn>=1.5",
#     "matplotlib>=3.9",
#     "seaborn>=0.13.2",
#     "soundfile>=0.13",
#     "python-docx>=1.1",
# ]
# ///

# %% [markdown]
"""
# Speech emotion recognition on RAVDESS: sound, words, and both

Trains six models and compares sixteen systems that tell emotions apart, on speakers that none has ever heard:

    clip --> frozen speech encoder ----------> SpeechEncoder -----.
     |--> log-mel spectrogram ---------------> AudioCNN ----------|---> early fusion: joined features,
     |                                                            |     one new classification head
     '--> transcript (simulated | Whisper) --> TextRNN, TextBERT -'---> late fusion: mean or learned weights

    python emotion_recognition.py                                  everything, on the corpus in archive/
    python emotion_recognition.py --demo                           everything, on a small synthetic corpus
    python emotion_recognition.py --folds 0,1,2,3,4                cross-validation, every actor tested once
    python emotion_recognition.py --manifest corpus.csv            another corpus, listed in a table
    python emotion_recognition.py --phase data                     what there is, and how it is split
    python emotion_recognition.py --phase unimodal                 sound and words, without early fusion
    python emotion_recognition.py --phase fusion --epochs-cnn 5    fusions and their parts, another setting
    python emotion_recognition.py --phase report                   tables, plots and report once more
    python emotion_recognition.py --phase predict --input me.wav   an answer, also before anything is trained
    python emotion_recognition.py --phase evaluate --manifest other.csv   their figures on another corpus
    python emotion_recognition.py --help                           every setting is a constant and a flag

On unseen actors SpeechEncoder, Whisper's encoder frozen, reaches 78.8 % UAR (chance 12.5; five folds, one
seed, 95 % interval 75.2 to 82.7), AudioCNN, trained from scratch, 68.7 % (64.8 to 72.7).
Simulated sentences are drawn by label: they show what the code does, not what words tell about feelings.

The file reads in the order in which the data flows. What decides a figure stands in sections 4 to 17; the
sections after them find files, draw, report and answer. What a training depends on is compared with what its
checkpoint says, the code between `Corpus` and `SYSTEMS` included: edited science trains anew.
"""

# %% 2. Imports
import argparse
import ast
import contextlib
import copy
import csv
import difflib
import fnmatch
import functools
import glob
import hashlib
import importlib
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
import unicodedata
import warnings
import zipfile
import zlib
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

# What is slow to import and seldom used, such as seaborn, is imported where it is used.
# Threads that wait by spinning make training many times slower beside other work. Libraries read this when
# they are loaded; what the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import filelock
import numpy as np
import pandas as pd
import soundfile
import soxr
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter1d, median_filter
from scipy.signal import butter, cheby2, sosfilt, sosfiltfilt
from scipy.special import log_softmax, softmax
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map

if "ipykernel" not in sys.modules:  # inherited from a notebook, it may name what is not installed here
    os.environ.pop("MPLBACKEND", None)
import matplotlib.pyplot as plt
from matplotlib import font_manager

__version__ = "2.0"

# %% 3. Configuration: every constant is a flag (EPOCHS_CNN -> --epochs-cnn), its comment the help text
# fmt: off
# What to run
RAVDESS_PATH = "./archive/audio_speech_actors_01-24/"  # folder that is searched for RAVDESS clips
MANIFEST = ""                    # your own corpus: CSV of path, emotion and maybe speaker, transcript, split
DOWNLOAD = False                 # fetch the official archive of RAVDESS (208 MB) if it is not there
OUTPUT_DIR = "outputs"           # folder for checkpoints, tables, plots and the report
PHASE = "all"                    # stages to run; fusion trains the parts that it needs too
RUN_MODELS = "cnn,speech,rnn,bert,fusion_rnn,fusion_bert"  # models to train, comma-separated
REUSE_EDITED = False             # keep models that were trained by another version of this code
INPUT = ""                       # recordings to answer: a file, a folder, a pattern (a/*.wav), a CSV of paths
ASK_SYSTEMS = ""                 # who answers, comma-separated: cnn,late_speech; empty: all that are trained
TEXT = ""                        # what is said in INPUT; else Whisper's transcript, if its weights are there
JSON = False                     # --phase predict prints a JSON document for each recording, a line each
DEMO = False                     # a small synthetic corpus instead, results in OUTPUT_DIR/demo
DEVICE = "auto"                  # where to compute; auto takes the fastest that is there
SEED = 42                        # seed of initialisation, order, augmentation and sentences
RUNS = 1                         # trainings of every fold, with SEED, SEED + 1, ...
ONLY_RUN = 0                     # train this one of several runs, from 1 on, without results; 0: all
# Splits
LEAVE_OUT = ""                   # emotions to do without, comma-separated: calm,disgust
MERGE = ""                       # emotions to count as others, in pairs: calm=neutral,boredom=sad
SPLIT = "speaker"                # no actor in two splits; text: nor a sentence; half: half the clips; random
FOLDS = "0"                      # which fifth of the actors is tested; 0,1,2,3,4: cross-validation
TEST_VIEWS = 5                   # slightly different readings of a clip that are averaged; 1: one
# Words
USE_SIMULATED_SENTENCES = True   # sentences drawn by label (an oracle); no: Whisper transcripts
SENTENCE_NOISE = 0.0             # share of clips whose sentences are dealt anew, whatever their emotion
SENTENCES_CSV = ""               # your own sentences: columns emotion, sentence; 5 or more per emotion
WHISPER_MODEL = "base"           # Whisper checkpoint, a name or a file
WHISPER_LANGUAGE = "en"          # language of what Whisper transcribes; empty: detected
BERT_MODEL = "distilbert-base-uncased"  # pretrained text encoder, a hub name or a folder
MAX_TOKENS = 40                  # longest transcript, in words or word pieces
FUSION = "concat"                # early fusion joins features; attention: both attend first; or both kinds
# Sound
SAMPLING_RATE = 16000            # in Hz, everything is resampled to it
CHANNEL = 0                      # the channel that is heard, from 1 on; 0: the mean of all
TRIM_DB = 30.0                   # silence is what lies this far below the loudest speech nearby
CLIP_SECONDS = 2.56              # length of the window that the network sees
N_MELS = 64                      # mel bands, 50 Hz to half the sampling rate
N_FFT = 1024                     # samples in an FFT window
HOP_LENGTH = 256                 # samples between two frames
SPEECH_ENCODER = "whisper"       # what SpeechEncoder hears with: WHISPER_MODEL, or a hub name or folder
# Training
EPOCHS_CNN = 100                 # passes over the training split, AudioCNN
EPOCHS_RNN = 20                  # the same, TextRNN
EPOCHS_BERT = 4                  # the same, TextBERT
EPOCHS_FUSION = 5                # the same, early fusion
LEARNING_RATE_CNN = 2e-3         # peak of the one-cycle schedule, AudioCNN
LEARNING_RATE_RNN = 2e-3         # the same, TextRNN
LEARNING_RATE_BERT = 1e-4        # the same, TextBERT
LEARNING_RATE_FUSION = 2e-3      # the same, early fusion
SPEECH_C = 3e-3                  # inverse strength of the penalty on SpeechEncoder's head
BATCH_SIZE = 32                  # clips in a batch
WEIGHT_DECAY = 0.05              # AdamW, on weight matrices only
DROPOUT = 0.4                    # share of features dropped before a head
WORD_DROPOUT = 0.3               # share of words hidden in training
CLASS_WEIGHTS = True             # rarer emotions count more in the loss, where clips are 3:1 and more
LABEL_SMOOTHING = 0.1            # share of the target spread over all emotions
MIXUP = 0.3                      # both parameters of the Beta distribution, 0 for none
EMA_DECAY = 0.99                 # moving average of the weights, per step
# fmt: on

SETTINGS = {name: type(value) for name, value in list(globals().items())
            if name.isupper() and type(value) in (bool, int, float, str)}
ALLOWED = {  # texts: one of them; numbers: least and most, floats if written so; others: whole, 1 and more
    "phase": ("all", "data", "unimodal", "fusion", "report", "predict", "evaluate"),
    "fusion": ("concat", "attention", "both"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "split": ("speaker", "text", "half", "random"),
    "seed": (0, 2**31),
    "runs": (1, 1000),
    "only_run": (0, 10000),
    "channel": (0, 1024),
    "test_views": (1, 5),
    "max_tokens": (4, 512),
    "sampling_rate": (4000, 192000),
    "n_mels": (16, 512),
    "n_fft": (64, 65536),
    "sentence_noise": (0.0, 1.0),
    "ema_decay": (0.0, 0.9999),
    **dict.fromkeys("dropout word_dropout label_smoothing".split(), (0.0, 0.99)),
    "trim_db": (11.0, 1e6),  # less than noise wavers
    **dict.fromkeys("weight_decay mixup learning_rate_cnn learning_rate_rnn learning_rate_bert "
                    "learning_rate_fusion".split(), (0.0, 1e6)),
    "clip_seconds": (0.0, 600.0),
    "speech_c": (1e-9, 1e6),
}
LISTS = "run_models", "folds", "leave_out", "merge", "ask_systems"  # texts of comma-separated names
DEMO_SETTINGS = {
    "epochs_cnn": 8,
    "epochs_fusion": 4,
    "learning_rate_bert": 2e-3,
    "ravdess_path": "archive/demo/corpus",
    "bert_model": "archive/demo/distilbert",
    "whisper_model": "archive/demo/whisper.pt",
}
EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]  # in code order
SYNONYMS = {  # what other corpora call them
    "anger": "angry", "disgusted": "disgust", "fear": "fearful", "happiness": "happy", "joy": "happy",
    "sadness": "sad", "surprise": "surprised", "pleasant surprise": "surprised",
}
SPLITS = "train", "validation", "test"
WHOLE = (0.0, math.inf)  # from which second to which: all of a recording


class UserError(Exception):
    """What the user can mend, in one sentence; ends a script with exit code 2, a cell without traceback."""

    def _render_traceback_(self):
        """What Jupyter shows in place of a traceback."""
        return [f"error: {self}"]


def holding(sentences):
    """Those of {sentence: whether it holds} that hold, as a list."""
    return [sentence for sentence, holds in sentences.items() if holds]


def refuse(problems, error=UserError):
    """Raise an error with the first of {sentence: whether it holds} that holds."""
    for sentence in holding(problems):
        raise error(sentence)


class Settings(namedtuple("Settings", [*map(str.lower, SETTINGS), "given"])):
    """The settings of a command or of one of its runs: read-only, `_replace` makes others.

    `given` names those that stand on the command line. What a corpus decides is in Corpus, not here.
    """

    __slots__ = ()

    @property
    def fold(self):
        """The fold of a single run."""
        return int(self.folds)

    @property
    def cache(self):
        """The folder of what is kept by content, shared by all runs of OUTPUT_DIR."""
        folder = Path(self.output_dir)
        return (folder.parent if folder.match("fold_*_seed_*") else folder) / "cache"


def flag_of(name, value):
    """A setting as it stands on the command line: --epochs-cnn=5, --no-demo."""
    flag = "--" + "no-" * (value is False) + name.lower().replace("_", "-")
    return flag if type(value) is bool else f"{flag}={value}"


def read_number(key, text):
    """The number in a text, if it lies in its range; else the error that argparse reports."""
    # The ends of the range say the type too.
    low, high = ALLOWED.get(key, (1, 2**31))
    value = math.nan
    with contextlib.suppress(ValueError):
        value = type(low)(text)
    if not low <= value <= high:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text} is not of type {type(low).__name__} from {low} to {high}")
    return value


@functools.lru_cache(maxsize=1)
def source_code():
    """The text of this file; "" in a notebook, which has none."""
    return Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""


def usage_error(parser, message):
    """Raise a UserError in place of argparse's SystemExit, which would end a notebook's cell in a dump."""
    hint = "--help lists every flag"
    flags = re.findall(r"--[\w-]+", parser.format_help())
    # A flag with a colon behind it is right, its value is not.
    typed = re.findall(r"(?<!\S)--?[\w-]+(?=[ =]|$)", message.lower())
    for meant in difflib.get_close_matches("".join(typed[:1]), flags, 1, 0.7):
        hint = f"did you mean {meant}?"
    raise UserError(f"{message} ({hint})")


def make_parser():
    """The command line: a flag per constant; the comments of the constants are its groups and help texts."""
    examples = re.findall("^    (python .+)", __doc__ or "", re.MULTILINE)
    parser = argparse.ArgumentParser(
        prog="emotion_recognition.py", usage="python %(prog)s [flags]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, conflict_handler="resolve",  # a constant may stand there twice
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(["examples:", *examples]),
        description="Speech emotion recognition on RAVDESS: sound, words, and both.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.error = functools.partial(usage_error, parser)

    # A notebook has no file, so its flags have no help.
    comments = r"^# (.+)\n(?=[A-Z_]+ = )|^([A-Z_]+) = [^#\n]*(?:# (.+))?"
    constants, *_ = source_code().split("\nSETTINGS = ")
    found = re.findall(comments, constants, re.MULTILINE)
    group = parser
    for heading, name, text in found or [("", name, "") for name in SETTINGS]:
        if heading:
            group = parser.add_argument_group(heading)
        if name not in SETTINGS:
            continue
        key, kind = name.lower(), SETTINGS[name]
        options = {"type": functools.partial(read_number, key)}
        if kind is str:  # ~ is home, in flags and constants
            options = {"type": os.path.expanduser, "choices": ALLOWED.get(key)}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        text = f"{text} (default: {globals()[name]})".replace("%", "%%")
        group.add_argument(flag_of(name, True), help=text, **options)
    return parser


def parse_settings(argv=None):
    """Settings from the constants as they are now, and from flags. Raises UserError."""
    if argv is None:
        # A kernel's arguments, which name a file with -f or --f=, are not ours.
        argv = [] if in_kernel() and re.search(r"(^| )--?f\b", " ".join(sys.argv)) else sys.argv[1:]
    parser = make_parser()
    # Constants are read like flags, so that an edited constant is checked like a flag.
    values = vars(parser.parse_args([flag_of(name, globals()[name]) for name in SETTINGS]))
    given = vars(parser.parse_args(argv))
    if (values | given)["demo"]:
        # Few epochs, but for a constant that was edited to still fewer.
        fewer = {key: min(values[key], DEMO_SETTINGS[key]) for key in ("epochs_cnn", "epochs_fusion")}
        values |= DEMO_SETTINGS | fewer
        folder = Path((values | given)["output_dir"])
        # Once, also where one of several runs is named.
        if not (folder.match("demo") or folder.match("demo/fold_*")):
            given["output_dir"] = str(folder / "demo")

    cfg = Settings(**values | given, given=tuple(given))
    cfg = cfg._replace(**{key: ",".join(names_in(getattr(cfg, key))) for key in LISTS})
    if cfg.input and "phase" not in given:
        cfg = cfg._replace(phase="predict")
    check_settings(cfg)
    return cfg


def check_settings(cfg):
    """Raise a UserError that names the first flags which cannot be or do not go together."""
    folds, names = names_in(cfg.folds), set(names_in(cfg.run_models))
    runs = len(runs_of(cfg))
    known = [name for name in TRAINED if not name.startswith("attention")]
    if cfg.phase == "predict":
        refuse_idle(cfg, PREDICTS_WITH, "--phase predict")
    # One corpus a run; --download fills the folder of --ravdess-path.
    corpora = holding({f"--manifest {cfg.manifest}": cfg.manifest, "--demo": cfg.demo,
                       "--ravdess-path or --download": cfg.download or "ravdess_path" in cfg.given})
    refuse({
        f"{' and '.join(corpora)} are corpora of their own: leave out all but one": len(corpora) > 1,
        "--phase evaluate needs another corpus: name its table with --manifest":
            cfg.phase == "evaluate" and not cfg.manifest,
        f"--run-models {cfg.run_models!r} is not a list of names out of {', '.join(known)}":
            not names or names.difference(known),
        f"--folds {cfg.folds!r} is not a list of different folds out of 0,1,2,3,4":
            sorted(set(folds) & set("01234")) != sorted(folds) or not folds,
        f"--only-run {cfg.only_run}: --folds, --runs and --split make {plural(runs, 'run')}":
            cfg.only_run > runs,
        "--split random has no folds: leave out --folds and --runs, or --split random":
            cfg.split == "random" and len(folds) * cfg.runs > 1,
        f"--clip-seconds {cfg.clip_seconds} is shorter than {LEAST} frames of --hop-length":
            cfg.clip_seconds * cfg.sampling_rate < LEAST * cfg.hop_length,
    })
    refuse_pointers(cfg)


def refuse_idle(cfg, useful, who):
    """Raise a UserError when flags were given of which `who` makes no use, for companions too."""
    idle = [flag_of(key, getattr(cfg, key)) for key in cfg.given if key not in useful]
    refuse({f"{who} has no use for {' '.join(idle)}: leave it out": idle})


def refuse_pointers(cfg):
    """Raise a UserError when weights that a flag names lie here as pointers, which git has not fetched."""
    for name in (cfg.bert_model, cfg.speech_encoder, cfg.whisper_model):
        with contextlib.suppress(OSError, ValueError):  # names of the hub need not be paths
            for path in filter(Path.is_file, (Path(name), *Path(name).glob("*"))):
                with path.open("rb") as file:
                    pointer = file.read(len(GIT_LFS)) == GIT_LFS
                refuse({f"{path} is a pointer of Git LFS and not the file: git lfs pull fetches it": pointer})


def names_in(text):
    """The comma-separated names of a setting, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def runs_of(cfg):
    """The settings of each run: one per seed and fold, each with its own folder if there are several."""
    runs, seeds = [], range(cfg.seed, cfg.seed + cfg.runs)
    # Both ways round: trained on each half of the sentences.
    splits = {"text": ["statement_1", "statement_2"]}.get(cfg.split, [cfg.split])
    # Every fold of a seed before the next seed: a whole cross-validation is there as early as possible.
    for seed, fold, split in itertools.product(seeds, names_in(cfg.folds), splits):
        folder = f"fold_{fold}_seed_{seed}" + f"_{split}" * (cfg.split == "text")
        runs.append(cfg._replace(folds=fold, seed=seed, runs=1, split=split,
                                 output_dir=str(Path(cfg.output_dir, folder))))
    return runs if len(runs) > 1 else [cfg]


# %% 4. The corpus
@dataclass(frozen=True)
class Corpus:
    """A corpus that was read, and all that it decides where settings leave things open.

    `source` is its folder or table. `clips` has a row per usable clip, sorted by name: clip, path,
    emotion (categories in the order of the labels), actor, digest of the file's bytes, what `load_clip`
    makes of it and what else is known (intensity, statement, repetition, sex, split, transcript, and the
    span of a segment). `left_out` has the path of every other file, and the reason. `split` says how
    clips are dealt: speaker, text, half, random, or manifest, as the table itself says. `words` says where
    sentences come from: simulated, whisper, manifest, or, when there are none, why. `caveats` is what every
    page must say.
    """

    name: str
    source: str
    clips: pd.DataFrame
    left_out: pd.DataFrame
    split: str
    words: str
    caveats: tuple

    @property
    def has_words(self):
        """Whether there are sentences for the systems that read words."""
        return self.words in ("simulated", "whisper", "manifest")


AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
GIT_LFS = b"version https://git-lfs"  # how a file begins that git has not fetched yet
FOREIGN = ("its folder has names that RAVDESS cannot have (actor above 24, statement 03 or strong neutral): "
           "list another corpus in a --manifest")
REASONS = {  # why a file is no clip: that of the first pattern which its name fits; "": it is one
    "other name": r"(?!([0-9]{2}-){6}[0-9]{2}\.[^.]*$)",
    "video": r"(?!03)|.*\.mp4$",
    "song": "03-02",
    FOREIGN: "03-01-(01-02-|..-..-03|..-..-..-..-(2[5-9]|[3-9].))",
    "": "03-01-0[1-8]-0[12]-0[12]-0[12]-(?!00)",
    "a code in its name is none of RAVDESS's": "",
}
PASSED_OVER = ["second copy", "song", "video", "other name", "--leave-out"]  # why files are no clips
UNFINISHED = ".unfinished"  # ends the name of a folder that --download is still filling
RESERVED = {  # columns of tables: names that no emotion may have
    "no speech",
    *("system fold seed split clip actor emotion true predicted caveats transcript intensity sex "
      "statement repetition digest path mel samples confidence accuracy start end voiced recording "
      "error model note text text_source over_time unsure gate by clips uar nll ece macro_f1 key").split(),
}


def read_corpus(cfg, known=()):
    """The corpus that the settings name, with features. Raises UserError.

    --merge may name emotions of the corpus and `known` ones.
    """
    source = cfg.manifest or find_corpus(cfg)
    files = list_manifest(source) if cfg.manifest else list_ravdess(source)
    files = without_emotions(merged(files, cfg, known), names_in(cfg.leave_out))
    files = load_clips(files, cfg)

    # A copy under the same name counts once, and a damaged first copy does not hide a good second one.
    copies = files.duplicated(["clip", "reason"]) & (files["reason"] == "")
    files["reason"] = files["reason"].mask(copies, "second copy")
    clips = files.query("reason == ''").drop(columns="reason").sort_values("clip", ignore_index=True)
    left_out = files.query("reason != ''")[["path", "reason"]]

    refuse({f"{unusable(left_out)}{source} has no clip that can be used: see --ravdess-path or --manifest":
            clips.empty})
    lost = sorted({*files.get("split", [])}.difference(clips.get("split", [])))
    refuse({f"{unusable(left_out)}no clip of the split {', '.join(lost)} of {source} is left: see --manifest":
            lost and not known})
    split, words = split_kind(clips, cfg), words_kind(clips, cfg)
    name = Path(cfg.manifest).name or "RAVDESS"
    refuse({f"--sentence-noise and --sentences-csv are for simulated sentences, which {name} does not use: "
            "leave them out": words != "simulated" and (cfg.sentence_noise or cfg.sentences_csv)})
    return Corpus(name, str(source), clips, left_out, split, words, caveats_of(clips, split, words, cfg))


def own_words(known):
    """What models call emotions that they know, by the words of others: {anger: angry}; {} for no models."""
    return {word: name for word, name in SYNONYMS.items() if known and word not in known}


def counted_as(cfg, known):
    """{emotion: what it counts as} by --merge and by the words of models that know some. Raises UserError."""
    own = own_words(known)
    pairs = [tuple(map(str.strip, pair.partition("=")[::2])) for pair in names_in(cfg.merge.lower())]
    typed, asked = dict(pairs), {(own.get(word, word), own.get(name, name)) for word, name in pairs}
    counts = {word: name for word, name in asked if word != name}
    twice = len(typed) < len(pairs) or len(dict(asked)) < len(asked)
    refuse({f"--merge {cfg.merge} counts an emotion as two, or as one that is itself merged: name each once":
            twice or {*typed} & {*typed.values()} or {*counts} & {*counts.values()}})
    return {word: counts.get(name, name) for word, name in own.items()} | counts


def merged(files, cfg, known):
    """Listed files with their emotions as --merge names them. Raises UserError."""
    names, classes = counted_as(cfg, known), classes_of(files)
    every = list(dict.fromkeys([*EMOTIONS, *classes, *known]))
    refuse({f"--merge {cfg.merge} is not a list of pairs such as calm=neutral, of {', '.join(every)}":
            {*names, *names.values()}.difference(every, own_words(known))})
    called = {name: names.get(name, name) for name in classes}
    there = [name for name in every if name in called.values()]
    return files.assign(emotion=pd.Categorical(files["emotion"].astype(object).map(called), there))


def without_emotions(files, unwanted):
    """Listed files without the classes of --leave-out, their clips with that reason. Raises UserError."""
    classes = classes_of(files)
    wanted = [emotion for emotion in classes if emotion not in unwanted]
    refuse({f"--leave-out {','.join(unwanted)} is not a list out of {', '.join(classes)} that leaves two and "
            "more": set(unwanted).difference(classes) or len(wanted) < 2})
    return files.assign(emotion=files["emotion"].cat.set_categories(wanted),
                        reason=files["reason"].mask(files["emotion"].isin(unwanted), "--leave-out"))


def find_corpus(cfg):
    """The folder that holds the clips: --ravdess-path, or the first usual place with RAVDESS names in it."""
    path = Path(cfg.ravdess_path)
    places = [path]
    if path.parent == Path("archive") and "ravdess_path" not in cfg.given:
        cache = os.environ.get("KAGGLEHUB_CACHE", os.path.expanduser("~/.cache/kagglehub"))  # noqa: PTH111
        places += map(Path, ["archive", "/kaggle/input", cache])
    for place in places:
        if list_ravdess(place)["reason"].isin(["", FOREIGN]).any():
            return place

    reason = "does not exist"
    if path.exists():
        reason = "holds no clips named like 03-01-05-01-02-01-12.wav"
    raise UserError(f"{path} {reason} (searched: {', '.join(map(str, places))}): fetch RAVDESS with "
                    "--download, or unpack Audio_Speech_Actors_01-24.zip of "
                    f"https://zenodo.org/records/1188976 into {path}, or "
                    "name a folder of its clips with --ravdess-path, or try the synthetic corpus with --demo")


def unusable(left_out):
    """How many clips cannot be used, and the first of them, as the beginning of a sentence; "" if all can."""
    broken = left_out[~left_out["reason"].isin(PASSED_OVER)]
    if broken.empty:
        return ""
    path, reason = broken.iloc[0]
    return f"{plural(len(broken), 'clip')} cannot be used (the first, {path}: {reason}); "


def audio_files(folder, suffixes=(*AUDIO_SUFFIXES, ".mp4")):
    """The paths of all files with some suffixes under a folder, of any with (); links to folders once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        root = Path(root)
        if root.resolve() in seen:
            folders.clear()
            continue
        seen.add(root.resolve())
        # What --download has not finished is no corpus, nor is what the demo wrote.
        folders[:] = sorted(name for name in folders
                            if not name.endswith(UNFINISHED) and not (root / name).match("archive/demo"))
        for path in map(root.joinpath, sorted(files)):
            hidden = path.name.startswith(".")  # a note of the system, such as ._a.wav
            if not suffixes or (path.suffix.lower() in suffixes and not hidden):
                yield path


def list_ravdess(folder):
    """All audio files under a folder, as speech clips by their names; `reason` says which are none, and why.

    Columns: clip, path, reason ("" for clips), emotion, intensity, statement, repetition, actor, sex.
    """
    rows = []
    for path in audio_files(folder):
        reason = next(why for why, pattern in REASONS.items() if re.match(pattern, path.name.lower()))
        # What is no clip has the code 0, which says nothing; all clips are 03-01, speech.
        codes = [0] * 5 if reason else map(int, path.stem.split("-")[2:])
        rows.append((path.stem, str(path), reason, *codes))

    columns = "clip path reason emotion intensity statement repetition actor".split()
    files = pd.DataFrame(rows, columns=columns)
    files["emotion"] = pd.Categorical.from_codes(files["emotion"] - 1, EMOTIONS)
    files["intensity"] = files["intensity"].map({1: "normal", 2: "strong"})
    files["sex"] = files["actor"].mod(2).map({0: "female", 1: "male"})
    # Where one name is another corpus's, its neighbours' numbers fit but mean something else.
    foreign = (files["reason"] == FOREIGN).groupby(files["path"].map(os.path.dirname)).transform("any")
    return files.assign(reason=files["reason"].mask(foreign, FOREIGN))


SPLIT_NAMES = {"training": "train", "testing": "test", **dict.fromkeys(("dev", "val", "valid"), "validation")}


def list_manifest(path):
    """The clips that a table lists, as `list_ravdess` has them, with the `span` of each in its file in s.

    Relative paths start in the table's folder. Emotions are the table's own, RAVDESS's first; a column
    speaker, split or transcript that is empty throughout counts as absent. A UserError names a bad line.
    """
    advice = "mend it or leave out --manifest"
    table = read_table(path, ["path", "emotion"], "speaker split transcript start end".split(), advice)
    table["path"] = table["path"].map(path_in)
    table["emotion"] = table["emotion"].str.lower()
    table["split"] = table["split"].str.lower().replace(SPLIT_NAMES)
    segments = ("#" + table["start"] + "-" + table["end"]).replace("#-", "")
    table["clip"], table["span"] = table["path"] + segments, spans_of(table)
    table["file"] = table["path"].map(Path(path).parent.joinpath)
    refuse_manifest(path, table, advice)

    emotions = dict.fromkeys([*EMOTIONS, *sorted(table["emotion"])])
    emotion = pd.Categorical(table["emotion"], list(emotions)).remove_unused_categories()
    refuse({f"{path} has fewer than two emotions to tell apart: {advice}": len(emotion.categories) < 2})
    known = [name for name in ("split", "transcript") if (table[name] != "").any()]
    files = table[["clip", "span", *known]].assign(
        path=table["file"].map(str),
        emotion=emotion,
        actor=numbers_if_plain(one_spelling(table["speaker"])),
        reason="")
    return files.reset_index(drop=True)


def path_in(text):
    """A path of a table, which may come from Windows or start at home."""
    return PureWindowsPath(os.path.expanduser(text)).as_posix()  # noqa: PTH111


def spans_of(table):
    """(start, end) of each line of a table in s, the whole file where it names none, NaN for other texts."""
    texts = table[["start", "end"]].replace({"start": {"": "0"}, "end": {"": "inf"}})
    return list(texts.apply(pd.to_numeric, errors="coerce").itertuples(index=False, name=None))


def refuse_manifest(path, table, advice):
    """Raise a UserError for the first line of a manifest that is not what it should be."""
    refuse({f"{path} lists no clips: {advice}": table.empty})
    if not table["file"].map(os.path.isfile).any():
        refuse_elsewhere(path, table, advice)
    named, dealt = (table[["speaker", "split"]] != "").any()
    # Two spellings may name one file.
    files, seen = table["file"].map(os.path.realpath).str.normalize("NFC"), {}
    for line, file in zip(table.itertuples(), files):
        start, end = line.span
        first = seen.setdefault((file, start, end), line.Index)
        refuse_line(path, line.Index, {
            "it has no path": line.path == ".",  # how pathlib writes ""
            "it has no emotion": not line.emotion,
            f"{line.emotion!r} is the name of a column in tables of predictions": line.emotion in RESERVED,
            "it has no speaker, and other lines have one": named and not line.speaker,
            f"{line.split!r} is none of {', '.join(SPLITS)}": dealt and line.split not in SPLITS,
            f"start {line.start!r} and end {line.end!r} are not seconds in this order": not 0 <= start < end,
            f"the path of line {first} again": first < line.Index,
        }, advice)


def refuse_elsewhere(path, table, advice):
    """Raise a UserError when a manifest's first clip lies where its path would lead if it began elsewhere."""
    number, text, tried = next(table[["path", "file"]].itertuples())
    # In the working folder, or where another machine had its files.
    places = Path(text), Path(path).parent / Path(text).name
    for other in filter(os.path.isfile, places):
        raise UserError(f"{path} line {number}: {tried} is not there, but {other} is: {advice}")


def one_spelling(names):
    """A column of names in which those that look the same are: Ann is ann, and 7 is 07 and 7.0."""
    alike = names.str.casefold().str.replace(r"\.0$|(?<![\d.])0+(?=\d)", "", regex=True)
    return names.groupby(alike).transform("first")


def numbers_if_plain(actors):
    """A column of speakers as whole numbers if all are plain ones: 2 comes before 10, but 02 is a name."""
    if actors.str.fullmatch("0|[1-9][0-9]{0,15}").all():
        return actors.astype(int)
    return actors


def read_csv(path, advice):
    """A csv.DictReader of a file in UTF-8 or marked UTF-16, however it is separated. Raises UserError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable as CSV ({error}): {advice}") from error
    # A guess at any other encoding would garble names.
    text = content.decode(("utf-8-sig", "utf-16")[content[:1] in b"\xff\xfe"], "replace")
    before, unread, _ = text.replace("\0", "\ufffd").partition("\ufffd")
    refuse({f"{path} line {len(f'{before}.'.splitlines())} has a zero byte or is not in the encoding UTF-8, "
            f"which Excel calls CSV UTF-8: {advice}": unread})

    # Excel separates by semicolons where commas are decimal, and may say so in a line of its own.
    text = re.sub(r'^"?sep=[^\r\n]*\s+', "", text)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True,
                          strict=True)


def read_table(path, needed, optional, advice, others=False):
    """The columns of a CSV as stripped texts, indexed by line number; with `others`, all it has.

    A UserError names a bad line.
    """
    reader = read_csv(path, advice)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        rows = {reader.line_num: row for row in reader}  # noqa: B035, it counts
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num} is not readable as CSV ({error}; within "
                        f"quotes, a quote is written twice): {advice}") from error

    # What csv lets pass, but would be read as something else than was meant.
    columns = (others and [*filter(None, reader.fieldnames)]) or [*needed, *optional]
    named = [name for name in reader.fieldnames if name in columns]
    refuse({f"{path} line 1 must name the columns {' and '.join(needed)}, none twice: {advice}":
            set(needed).difference(named) or len(set(named)) < len(named)})
    for number, row in rows.items():
        refuse_line(path, number, {
            "it has more columns than line 1 (quote what has commas)": any(row.get(None, []))}, advice)

    table = pd.DataFrame(rows.values(), rows, columns, dtype=object).fillna("")
    for name in columns:
        # Line breaks within a cell would break the tables that are written.
        plain = table[name].str.split().str.join(" ")
        if name in ("emotion", "speaker"):  # other programs write a word where there is none
            plain = plain.str.replace("(?i)^(<?na>?|nan|none|null)$", "", regex=True).str.normalize("NFC")
        table[name] = table[name].str.strip() if name == "path" else plain
    return table[(table != "").any(axis=1)]


def refuse_line(path, number, problems, advice):
    """Raise a UserError with the first of the problems that a line of a table has."""
    refuse({f"{path} line {number}: {problem}: {advice}": has for problem, has in problems.items()})


def load_clips(files, cfg):
    """The listed files with mel, samples and digest of their clips, or the reason why one cannot be used."""
    def load(file):
        """What is known of a clip, or the reason."""
        try:
            span = getattr(file, "span", WHOLE)
            clip = load_clip(file.path, cfg, span=span)._asdict()
            part = "#{}-{}".format(*span) * (span != WHOLE)
            return {"reason": "", "digest": digest(Path(file.path).read_bytes()) + part, **clip}
        except AudioError as error:
            return {"reason": str(error)}

    load_torchaudio()  # now, so that an installation that does not work is one sentence
    listed = files.query("reason == ''")
    loaded = in_parallel(load, listed.itertuples())
    loaded = pd.DataFrame(loaded, listed.index, ["reason", "digest", *FEATURES, "note"])
    files.loc[listed.index, "reason"] = loaded.pop("reason")
    return files.join(loaded)


def in_parallel(function, items):
    """[function(item), ...] by a pool of threads, with a progress bar; safe in notebooks and on Windows."""
    items, threads = list(items), torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take this over: one clip, one thread, and the same last bit
    try:
        return thread_map(function, items, desc="Reading clips", max_workers=os.cpu_count(), leave=False,
                          disable=len(items) < 500)
    finally:
        torch.set_num_threads(threads)


def split_kind(clips, cfg):
    """How the clips of a corpus are dealt to the splits. Raises UserError when flags contradict it."""
    own, named = "split" in clips, (clips["actor"] != "").all()
    if named and not own:
        return cfg.split

    why = "a column split" if own else "no column speaker"
    asked = ("split" in cfg.given or cfg.split != "speaker") and (own or cfg.split != "random")
    refuse({f"{cfg.manifest} has {why}: leave out --folds, --runs and --split":
            cfg.folds != "0" or cfg.runs > 1 or asked})
    # Without names there is no split by speaker.
    return "manifest" if own else "random"


def words_kind(clips, cfg):
    """Where the sentences of a corpus come from, or a sentence that says why there are none."""
    if "transcript" in clips:
        return "manifest"
    if not cfg.use_simulated_sentences:
        return "whisper"
    classes = classes_of(clips)
    lacking = ", ".join(sorted({*classes}.difference(sentence_bank(cfg.sentences_csv, classes))))
    if not lacking:
        return "simulated"
    return (f"no sentences for {lacking}: add a column transcript to {cfg.manifest}, or choose "
            "--sentences-csv or --no-use-simulated-sentences")


def caveats_of(clips, split, words, cfg):
    """What every page, plot and table must say about how its figures came to be."""
    noise = f", noise {cfg.sentence_noise}" * bool(cfg.sentence_noise)
    return tuple(holding({
        "synthetic demo corpus: the figures mean nothing": cfg.demo,
        f"text: simulated sentences (oracle{noise})": words == "simulated",
        f"without {', '.join(names_in(cfg.leave_out))}": cfg.leave_out,
        f"merged: {cfg.merge}": cfg.merge,
        "validation: every fifth speaker of the manifest's training split": lacks_validation(clips),
        "random split: speakers shared between splits": split == "random",
        "tested on sentences that are not in training": split == "text",
        "trained on every other clip of each speaker": split == "half",
        "split of the manifest: speakers shared between splits or unknown":
            split == "manifest" and clips.groupby("actor")["split"].nunique().max() > 1}))


def lacks_validation(clips):
    """Whether a split of the manifest has train and test only, as most corpora are published."""
    return "split" in clips and "validation" not in set(clips["split"])


def classes_of(clips):
    """The emotions in the order of their labels."""
    return list(clips["emotion"].cat.categories)


# %% 5. Splits
# The five folds of Luna-Jimenez et al. (2021), with the validation actors of Mak-Sim/ResLSTM-SER.
TEST_ACTORS = (2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22)
VALIDATION_ACTORS = (3, 6), (10, 11), (8, 17), (1, 14), (2, 5)
BY_SPEAKER = "speaker", "text", "half"  # the splits that have folds


def split_clips(corpus, run):
    """The clips of a run with the column `split`: train, validation or test. Raises UserError.

    Clips whose sound occurs in two splits stay in the first of them, so that nothing is scored on what it was
    trained on.
    """
    clips = corpus.clips
    if corpus.split in BY_SPEAKER:
        folds = fold_actors(clips)
        refuse({f"{clips['actor'].nunique()} actor(s) cannot be split by speaker into three (fold "
                f"{run.fold}): name more under --ravdess-path or in --manifest, lower --folds, or choose "
                "--split random": run.fold >= len(folds)})
        clips = deal(clips, "actor", *folds[run.fold])
        if corpus.split == "half":  # as much training as with text, but of all sentences
            turns = clips.groupby(["actor", "emotion"], observed=True).cumcount()
            clips = clips[(clips["split"] == "test") | (turns % 2 == 0)]
        if corpus.split == "text":
            half = sentence_halves(clips, corpus, run) == run.split[-1]
            clips = clips[half == (clips["split"] == "train")]
    elif corpus.split == "random":
        clips = clips.assign(sound=shared_sound(clips["digest"]))
        clips = deal(clips, "sound", *random_sounds(clips, run.seed)).drop(columns="sound")
    elif lacks_validation(clips):
        clips = with_validation(clips, corpus.source)
    # Under another name, the same sound may stand on the other side of the split.
    return unheard(clips)


def with_validation(clips, source):
    """The clips of a split without validation, which takes every fifth speaker of train. Raises UserError."""
    speakers = sorted(set(clips.query("split == 'train'")["actor"]))[1::5]
    refuse({f"{source} has no split validation, and too few named speakers in train to choose some: complete "
            "its column split or speaker": not speakers})
    taken = (clips["split"] == "train") & clips["actor"].isin(speakers)
    return clips.assign(split=clips["split"].mask(taken, "validation"))


def spans_in(digests):
    """File, start and end in s of digests (N,) of clips, in this order: a table with their index."""
    parts = digests.str.extract("(?P<file>[^#]*)(?:#(?P<start>.+)-(?P<end>.+))?")
    parts = parts.astype({"start": float, "end": float}).fillna({"start": WHOLE[0], "end": WHOLE[1]})
    return parts.sort_values(["file", "start"])


def shared_sound(digests):
    """Keys of digests (N,) of clips, the same for segments of a file that overlap, and for the whole file."""
    parts = spans_in(digests)
    # A segment has no sound of those that begin before it if all of these have ended.
    ends = parts.groupby("file")["end"].cummax().groupby(parts["file"]).shift()
    return (~(parts["start"] < ends)).cumsum().reindex(digests.index)


def heard_among(parts, others):
    """Which clips (N,) in a table of `spans_in` have sound in common with those that `others` (N,) marks."""
    files = parts["file"]
    ended = parts["end"].where(others, -math.inf).groupby(files).cummax()
    begins = parts["start"].where(others, math.inf)[::-1].groupby(files).cummin()[::-1]
    return (ended > parts["start"]) | (begins < parts["end"])


def unheard(clips):
    """The clips of a run that have no sound of a clip which an earlier split keeps."""
    parts = spans_in(clips["digest"]).assign(order=clips["split"].map(SPLITS.index))
    for split in (1, 2):
        heard = heard_among(parts, parts["order"] < split)
        parts = parts[~heard | (parts["order"] != split)]
    return clips[clips.index.isin(parts.index)].reset_index(drop=True)


def sentence_halves(clips, corpus, cfg):
    """Which half of the corpus's sentences is said in each clip, "1" or "2": a Series. Raises UserError.

    Of RAVDESS it is the statement, of other corpora every other sentence in the order of the alphabet.
    """
    if "statement" in clips:
        return clips["statement"].astype(str)
    # What nobody has written down may be any sentence, whatever Whisper hears.
    said = clips["clip"]
    if corpus.words == "manifest":
        words = clips["transcript"].map(words_in).map(" ".join)
        said = words.where(words != "<unk>", said)
    speakers = clips.groupby(said)["actor"].nunique()
    refuse({f"--split text needs sentences that speakers repeat word for word, and {speakers.idxmin()!r} has "
            f"one speaker: complete the column transcript of {cfg.manifest}, or leave out --split":
            speakers.min() < 2})
    return said.map(dict(zip(speakers.index, itertools.cycle("12"))))


def refuse_gaps(corpus, runs):
    """Raise a UserError that names the first emotion of which a split of some run has no clips."""
    # Eight emotions that silently become seven would be another task.
    for emotion, split in gaps_in(corpus, runs)[:1]:
        run, there = runs[0], corpus.clips.query("emotion == @emotion")
        first = next(iter(there["path"]), "none")
        flag = ("--ravdess-path", "--manifest")[bool(run.manifest)]
        advice = f"complete {corpus.source} (see {flag})"
        with contextlib.suppress(UserError):
            every = ",".join([*names_in(run.leave_out), *superfluous(corpus, runs)])
            advice += f", choose other --folds, or go on with --leave-out {every}"
        raise UserError(f"{unusable(corpus.left_out)}no {emotion} clip is left for {split}, of {len(there)} "
                        f"by {there['actor'].nunique()} speakers (the first: {first}): {advice}")


def gaps_in(corpus, runs):
    """The pairs of an emotion and a split that have no clips in some run."""
    gaps = []
    for run in runs:
        clips = split_clips(corpus, run)
        used = set(zip(clips["emotion"], clips["split"]))
        gaps += [pair for pair in itertools.product(classes_of(clips), SPLITS) if pair not in used]
    return gaps


def superfluous(corpus, runs):
    """The emotions to leave out so that every split of all runs has clips of each of the others.

    Raises UserError when too few emotions or speakers would be left.
    """
    unwanted = list(dict.fromkeys(emotion for emotion, _ in gaps_in(corpus, runs)))
    if not unwanted:
        return []
    # Without them other speakers may be left, and so other folds.
    files = without_emotions(corpus.clips.assign(reason=""), unwanted)
    rest = replace(corpus, clips=files.query("reason == ''"))
    return unwanted + superfluous(rest, runs)


def deal(clips, key, validation, test):
    """The clips with the column `split`, dealt by what the column `key` holds; train if it is in neither."""
    held_out = [clips[key].isin(test), clips[key].isin(validation)]
    return clips.assign(split=np.select(held_out, ["test", "validation"], "train"))


def fold_actors(clips):
    """(validation actors, test actors) of each fold; others than RAVDESS's go into up to five groups."""
    from sklearn.model_selection import StratifiedGroupKFold
    actors = set(clips["actor"])
    if len(actors) > 22 and actors <= set(range(1, 25)):  # one may be missing, and folds stay
        return [*zip(VALIDATION_ACTORS, TEST_ACTORS)]
    groups = min(5, len(actors), clips["emotion"].value_counts().max())
    if groups < 3:
        return []

    # Another corpus has no published folds, and speakers of any size: groups alike in clips and emotions.
    dealt = StratifiedGroupKFold(groups).split(clips, clips["emotion"], clips["actor"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an emotion that a split lacks is named later
        tested = [clips["actor"].iloc[rows].unique() for _, rows in dealt]
    return [*zip(tested[1:] + tested[:1], tested)]  # the next group validates


def random_sounds(clips, seed):
    """(validation, test) sounds, 15 % of every emotion's clips each. So the same bytes stay together."""
    from sklearn.model_selection import train_test_split
    once = clips.drop_duplicates("sound")
    part = functools.partial(train_test_split, random_state=seed)
    try:
        _, rest = part(once, test_size=0.3, stratify=once["emotion"])
        return part(rest["sound"], test_size=0.5, stratify=rest["emotion"])
    except ValueError as error:
        raise UserError(f"too few clips of some emotion for a random split ({error}): add clips, or a column "
                        "speaker, or go on with --leave-out EMOTION") from error


# %% 6. Sentences and transcripts
STATEMENTS = {1: "Kids are talking by the door", 2: "Dogs are sitting by the door"}  # of RAVDESS
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
    if path:
        return read_sentences(path, emotions)
    return {emotion: re.split("(?<=[.?]) ", " ".join(text.split())) for emotion, text in SENTENCES.items()}


def read_sentences(path, emotions):
    """The sentences of a CSV with columns emotion and sentence, by emotion. A UserError names a bad line."""
    advice = "mend it or leave out --sentences-csv"
    table = read_table(path, ["emotion", "sentence"], [], advice)
    bank, seen = {emotion: [] for emotion in emotions}, {}
    for number, emotion, sentence in table.itertuples():
        words = " ".join(words_in(sentence))
        first = seen.setdefault(words, number)
        refuse_line(path, number, {
            f"{emotion!r} is none of {', '.join(emotions)}": emotion not in {*emotions, *EMOTIONS},
            "the sentence has no words": words == "<unk>",
            f"the sentence of line {first} again": first < number,  # it could cross splits
        }, advice)
        # Sentences for emotions that this corpus lacks are ignored.
        bank.get(emotion, []).append(sentence)

    for emotion, sentences in bank.items():  # a fifth is tested, a fifth validates
        refuse({f"{path} has {len(sentences)} of 5 or more sentences for {emotion}: {advice}":
                len(sentences) < 5})
    return bank


def sentences_of(sentences, split, fold):
    """The sentences that a split may draw: no two splits share one, and five folds test each of them once."""
    places = {"test": [0], "validation": [1], "train": [2, 3, 4]}[split]
    return [sentence for index, sentence in enumerate(sentences) if (index - fold) % 5 in places]


def add_transcripts(clips, corpus, run):
    """The clips of a run with the column `transcript`: what is said in them, drawn by label or as it is."""
    if corpus.words != "simulated":
        return clips.assign(transcript=clips.get("transcript", ""))

    bank = sentence_bank(run.sentences_csv, classes_of(clips))
    clips = clips.assign(sentence_emotion=deal_emotions(clips, run))
    # Each clip has a generator of its own: its sentence does not depend on which other clips are there.
    drawn = []
    for row in clips.itertuples():
        sentences = sentences_of(bank[row.sentence_emotion], row.split, run.fold)
        drawn.append(random.Random(f"{run.seed}/{row.clip}").choice(sentences))
    return clips.assign(transcript=drawn)


def deal_emotions(clips, run):
    """The emotions (N,) that sentences are drawn for: those of the clips, SENTENCE_NOISE of them permuted.

    Exactly round(SENTENCE_NOISE * clips) of each split change places, so that at 1 words say nothing.
    """
    emotions = clips["emotion"].to_numpy(dtype=object, copy=True)
    rng = np.random.default_rng(run.seed)
    for split in SPLITS:
        rows = np.flatnonzero(clips["split"] == split)
        # Within a split, so that no sentence crosses to another one.
        chosen = rng.permutation(rows)[:round(run.sentence_noise * len(rows))]
        emotions[chosen] = emotions[rng.permutation(chosen)]
    return emotions


def transcribe(clips, cfg, device):
    """The clips with Whisper's transcripts, cached as JSON, so that a killed run goes on where it was.

    The cache knows what is heard of clips by its samples, and checkpoints by their bytes.
    """
    source, path = Path(cfg.whisper_model), Path(cfg.output_dir, "transcripts_whisper.json")
    model_key = digest(source.read_bytes()) if source.is_file() else cfg.whisper_model
    cache = read_back(path) if path.exists() else {}
    refuse({f"{path} holds no transcripts: delete it or name another --output-dir": type(cache) is not dict})
    # A cache by content: another checkpoint or a changed clip is transcribed anew.
    heard = clips["samples"].map(lambda samples: digest(samples.tobytes()))
    keys = f"{model_key} {cfg.whisper_language} " + heard
    todo = clips["samples"][~keys.isin(list(cache))]
    for row in tqdm(todo.index, "Transcribing", disable=todo.empty):
        samples = soxr.resample(todo[row], cfg.sampling_rate, 16000)
        cache[keys[row]] = transcript_of(samples, cfg, device)
        save(path, cache)
    return clips.assign(transcript=keys.map(cache))


WITHOUT_WHISPER = "train without it: --run-models cnn,rnn,bert, simulated sentences"


@functools.lru_cache(maxsize=1)
def load_whisper(name, device):
    """(module, model) of --whisper-model, a name (downloaded once) or a checkpoint file. Raises UserError."""
    whisper = load_package("whisper", f"pip install openai-whisper, or {WITHOUT_WHISPER}", "load_model")
    place = {"cuda": "cuda"}.get(device, "cpu")  # Whisper lacks operations of MPS
    if name in whisper.available_models() and not whisper_file(name).exists():
        print(f"Whisper {name} is fetched, once (base: 147 MB)", file=sys.stderr)
    try:
        return whisper, whisper.load_model(name, device=place)
    except Exception as error:  # no such name, no network, or a file that is something else
        raise UserError(f"--whisper-model {name} cannot be loaded ({type(error).__name__}): name the file "
                        f"of a Whisper checkpoint, or {WITHOUT_WHISPER}") from error


def whisper_file(name):
    """Where the weights of --whisper-model lie, or would lie once they are fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "whisper")  # noqa: PTH111
    full = {"large": "large-v3", "turbo": "large-v3-turbo"}.get(name, name)
    return Path(name) if Path(name).is_file() else cache / f"{full}.pt"


def decode_with_whisper(samples, cfg, device, **options):
    """What Whisper decodes greedily from the first 30 s of samples at 16 kHz, as its DecodingResult."""
    whisper, model = load_whisper(cfg.whisper_model, device)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), model.dims.n_mels).to(model.device)
    on_gpu, language = model.device.type == "cuda", cfg.whisper_language or None
    options = whisper.DecodingOptions(language=language, without_timestamps=True, fp16=on_gpu, **options)
    try:
        return model.decode(mel, options)
    except ValueError as error:  # a language that is none, or cannot be detected
        raise UserError(f"--whisper-language {cfg.whisper_language!r} is not for --whisper-model "
                        f"{cfg.whisper_model} ({error}): try --whisper-language en") from error


def transcript_of(samples, cfg, device):
    """What Whisper hears in the first 30 s of samples at 16 kHz, greedily. Raises UserError.

    "" where Whisper's own limits say that it made words out of silence.
    """
    result = decode_with_whisper(samples, cfg, device)
    # Words that Whisper makes out of silence or repeats without end are no transcript.
    silent = result.no_speech_prob > 0.6 and result.avg_logprob < -1.0
    return "" if silent or result.compression_ratio > 2.4 else result.text.strip()


def word_error_rate(clips):
    """Words wrong, missing or too many in transcripts, as a share of the words of RAVDESS's statements."""
    distance = load_torchaudio().edit_distance
    # torchaudio counts edits of sequences of anything, here of words; of an empty transcript all are wrong.
    true, found = clips["statement"].map(STATEMENTS).map(words_in), clips["transcript"].map(words_in)
    return sum(map(distance, true, found)) / true.map(len).sum()


# %% 7. Sound features
class AudioError(UserError):
    """Why a recording cannot be used."""


class Silence(AudioError):
    """There is nothing to be heard in a recording."""


# Log-mel (T, M), samples (n,) of its frames, second of the recording at which each frame lies (T,), and what
# must be said of its sound.
Clip = namedtuple("Clip", "mel samples seconds note")
FEATURES = ["mel", "samples", "seconds"]  # the columns of clips that hold their sound
PART = 300  # seconds that are read, and by Predictor answered, at a time
LEAST = 16  # frames: what is shorter says nothing
FLOOR = 1e-7  # of the loudest power, added to every mel band: fainter noise makes no difference
STEADY = 6  # dB between quiet and loud frames of noise; clips of RAVDESS have 22 and more


def load_clip(source, cfg, rate=0, span=WHOLE):
    """What is to be heard in a recording, without silent ends and long pauses, as a Clip. Raises AudioError.

    `source` is the path of a file, or an array of samples at `rate` Hz, of shape (n,), (n, channels) or
    (channels, n); `span` says from which second to which.
    """
    samples, note = load_samples(source, cfg, rate, span)
    hop, rate = cfg.hop_length, cfg.sampling_rate
    refuse({f"too short: {len(samples) / rate:.2f} s": len(samples) < LEAST * hop}, AudioError)
    power = mel_power(samples, cfg)  # (T, M)
    level = 10 * np.log10(power.sum(axis=1) + 1e-20)
    loud, top = loud_frames(level, cfg)
    kept = with_margins(loud, cfg)

    # All at one level, which says more of the microphone than of the speaker.
    samples = np.pad(samples, (0, hop - len(samples) % hop)) * np.float32(10 ** (1 - top / 20))
    samples = samples.reshape(-1, hop)[kept].ravel()
    # Rounding to 16 bits makes steady noise of silence; and a click is no speech.
    noise = top < -30 and spread_of(level[kept]) < STEADY
    refuse({"silent": noise or loud.sum() < LEAST or np.abs(samples).max() > 100}, Silence)

    power = power[kept] * 10 ** (-top / 10)
    note = note or "no sound above 4 kHz: less sure" * is_narrow(power, cfg)
    return Clip(np.log(power + FLOOR).astype(np.float16), samples, kept * hop / rate, note)


def load_samples(source, cfg, rate=0, span=WHOLE):
    """(float32 samples (n,) at SAMPLING_RATE, without what lies below voices, a note). Raises AudioError."""
    parts, note = [], ""
    for part, own_rate in sound_parts(source, rate, span):  # noqa: B007, all parts have the same
        refuse({"NaN, infinite or huge samples": not np.abs(part).max() < 1e6}, AudioError)
        samples, found = one_channel(part, cfg.channel)
        parts.append(samples)
        note = note or found
    samples = np.concatenate(parts)
    if own_rate != cfg.sampling_rate:
        samples = soxr.resample(samples, own_rate, cfg.sampling_rate)
    if len(samples) > cfg.hop_length:
        samples = sosfiltfilt(high_pass(cfg.sampling_rate), samples).astype(np.float32)
    return samples, note


@functools.lru_cache(maxsize=8)
def high_pass(rate):
    """A filter against offset, rumble and hum: run both ways, -50 dB up to 60 Hz, -1 dB at 80 Hz."""
    return cheby2(6, 25, 60, "highpass", fs=rate, output="sos")


def one_channel(part, channel):
    """A channel (n,) of samples (n, channels), from 1 on, or for 0 their mean; and a note on it."""
    if channel:
        refuse({f"--channel {channel}: it has {plural(part.shape[1], 'channel')}": channel > part.shape[1]},
               AudioError)
        return part[:, channel - 1], ""

    # A microphone that is off counts for nothing.
    power = np.square(part).mean(axis=0)  # (channels,)
    part = part[:, power >= 1e-3 * power.max()]
    mean = part.mean(axis=1)
    # 1 for channels that are the same, a half for two that have nothing in common.
    share = np.square(mean).mean() / (np.square(part).mean() + 1e-30)
    if share > 0.75 or part.shape[1] == 1:
        return mean, ""
    if share < 0.1:
        return part[:, 0], "channels that cancel each other: one was taken"
    return mean, f"{part.shape[1]} different channels were mixed: --channel 1 picks one"


def sound_parts(source, rate=0, span=WHOLE):
    """Yields (float32 samples (n, channels), rate in Hz) of a file or an array, PART seconds at a time.

    Raises AudioError, and UserError for what is no recording.
    """
    if not isinstance(source, (str, Path)):
        yield from array_parts(*numbers_of(source, rate), span)
        return
    opened = False
    try:
        with open_sound(str(source)) as file:
            opened = True
            yield from file_parts(file, span)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:  # the last of a name in .raw
        if opened or Path(source).suffix.lower() in AUDIO_SUFFIXES:
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            if getattr(error, "code", 0) == 7:  # libsndfile says of a text named .mp3 that it does not exist
                reason = "Format not recognised"
            raise AudioError(f"not readable ({reason.strip(' .')})") from error
        yield from array_parts(*decode_with_librosa(source), span)


def file_parts(file, span):
    """Yields (samples (n, channels), rate in Hz) of an open SoundFile, as far as its decoder comes."""
    rate = file.samplerate
    refuse({f"its header says {rate} Hz": not 1000 <= rate <= 768000}, AudioError)
    start, last = frames_in(span, file.frames, rate)
    # What an MP3 decoder gives right after a seek is damaged: it is read and dropped.
    early = min(start, rate // 4) * file.seekable()
    if file.seekable():
        file.seek(start - early)
    else:
        file.read(start)
    place = start - early
    while place < last:
        # By number, since some codecs cannot seek.
        part = file.read(min(early + PART * rate, last - place), "float32", always_2d=True)[early:]
        if not len(part):
            break
        place += early + len(part)
        early = 0
        yield part, rate
    # A length that nobody wrote is no promise.
    refuse({"no samples in it": place <= start,
            f"cut off: it ends after {place / rate:.2f} of {last / rate:.2f} s": place < last < 2**60},
           AudioError)


def array_parts(samples, rate, span):
    """Yields (samples (n, channels), rate in Hz) of an array (n, channels)."""
    first, last = frames_in(span, len(samples), rate)
    for place in range(first, last, PART * rate):
        yield samples[place:min(last, place + PART * rate)], rate


def frames_in(span, length, rate):
    """The first and the last frame of a span of a recording of `length` frames. Raises AudioError."""
    start, end = span
    seconds = length / rate
    refuse({"no samples in it": not length}, AudioError)
    # Tables round their seconds.
    inside = 0 <= start < min(end, seconds) and not seconds + 0.1 < end < math.inf
    refuse({f"its segment from {start} to {end} s does not lie in its {seconds:.2f} s": not inside},
           AudioError)
    first = math.floor(start * rate)
    return first, max(first + 1, round(min(end, seconds) * rate))


SIZES = {  # where the header of a file says how long it is: first byte, byte after the last, order
    b"RIFF": (4, 8, "little"),
    b"RF64": (20, 28, "little"),
    b"riff": (16, 24, "little"),
    b"FORM": (4, 8, "big"),
    b".snd": (8, 12, "big"),
}


LONGEST_PAGE = 65307  # of Ogg, in bytes


def open_sound(path):
    """An open SoundFile. Raises AudioError for what is no file of sound, or was cut off."""
    file = Path(path)
    refuse({
        "it is an address of the web: download it first": re.match("[a-z]{2,}:/", path),
        "it is a folder": file.is_dir(),
        "it does not exist": not file.exists(),
    }, AudioError)
    with file.open("rb") as opened:
        start = opened.read(4096)
        opened.seek(max(0, file.stat().st_size - LONGEST_PAGE))
        *_, found, page = opened.read().rpartition(b"OggS")
    # libsndfile reads a file that was cut off without a word; 0 and all ones were never filled in.
    first, last, order = SIZES.get(start[:4], (0, 0, "big"))
    declared = int.from_bytes(start[first:last], order)
    refuse({
        "not readable: it is empty": not start,
        "it is a pointer of Git LFS and not the file: git lfs pull fetches it": start.startswith(GIT_LFS),
        "cut off: less data than its header says": file.stat().st_size < declared < 0x7FFFF000,
        "cut off: its last page is not whole": start.startswith(b"OggS") and found and not is_whole(page),
    }, AudioError)
    unfilled = b"data\0\0\0\0"
    if start.startswith(b"RIFF") and unfilled in start:
        path = io.BytesIO(file.read_bytes().replace(unfilled, b"data\xff\xff\xff\xff", 1))
    return soundfile.SoundFile(path)


def is_whole(page):
    """Whether the bytes behind the last OggS of a file are a whole page; some recorders mark no last one."""
    first = 23 + int.from_bytes(page[22:23], "big")  # byte behind the lengths of its segments
    return len(page) >= first + sum(page[23:first])


def decode_with_librosa(path):
    """Samples (n, channels), float32, of a file that libsndfile cannot read, and their rate in Hz.

    Raises AudioError.
    """
    import librosa
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples, rate = librosa.load(path, sr=None, mono=False)
    except Exception as error:  # each of its backends has its own
        missing = ", and ffmpeg, which reads most formats, is not installed" * (not shutil.which("ffmpeg"))
        raise AudioError(f"not readable as audio{missing}") from error
    return np.atleast_2d(samples).T, round(rate)


def numbers_of(recording, rate):
    """Samples (n, channels), float32, and their rate in Hz, of an array, list, tensor or a pair of both.

    Raises UserError.
    """
    if isinstance(recording, tuple) and len(recording) == 2:  # as librosa and gradio give it
        rate, recording = sorted(recording, key=np.ndim)
    if hasattr(recording, "detach"):  # a tensor may need gradients, or lie on a GPU
        recording = recording.detach().cpu().float()
    samples = np.zeros(())
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # rows of different lengths, "16 kHz"
        samples, rate = np.asarray(recording), round(float(rate or 0))
    fine = samples.ndim in (1, 2) and 0 not in samples.shape[1:] and samples.dtype.kind in "iuf"
    refuse({"a recording is a path, or an array of numbers of shape (n,), (n, channels) or (channels, n) "
            "with its sampling_rate in Hz, from 1000 to 768000": not (fine and 1000 <= rate <= 768000)})
    if samples.dtype.kind != "f":
        # By the values, since 16 bits come in wider types too.
        samples = samples.astype(float)
        samples /= max(2.0**15, np.abs(samples).max(initial=0))
    if samples.ndim == 1 or samples.shape[0] < samples.shape[1]:
        samples = np.atleast_2d(samples).T
    return samples.astype(np.float32), rate


def load_package(name, advice, part="__name__"):
    """A package that may be missing or be another one, without `part`; a UserError ends with advice then."""
    try:
        package = importlib.import_module(name)
        refuse({f"{package} is another package of that name": not hasattr(package, part)})
        return package
    except Exception as error:  # also when it was made for another torch
        raise UserError(f"{name} does not load beside torch {torch.__version__} ({type(error).__name__}: "
                        f"{error}): {advice}") from error


def load_torchaudio():
    """torchaudio.functional, or a UserError with the line that repairs an installation that does not load."""
    return load_package("torchaudio.functional", 'pip install "torch==2.11.*" "torchaudio==2.11.*"')


@functools.lru_cache(maxsize=8)
def window_and_bank(rate, n_fft, n_mels):
    """A Hann window (N_FFT,) and mel filters (F, M) from 50 Hz to half the sampling rate, on HTK's scale."""
    bank = load_torchaudio().melscale_fbanks(n_fft // 2 + 1, 50.0, rate / 2, n_mels, rate)
    return torch.hann_window(n_fft), bank


def mel_power(samples, cfg):
    """The power of samples (n,) in M mel bands, float32 (T, M): a frame each HOP_LENGTH."""
    window, bank = window_and_bank(cfg.sampling_rate, cfg.n_fft, cfg.n_mels)
    spectrum = torch.stft(torch.from_numpy(samples), cfg.n_fft, cfg.hop_length, window=window,
                          pad_mode="constant", return_complex=True).T  # (T, F)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ bank).numpy()


def loud_frames(level, cfg):
    """Which frames of levels (T,) in dB are loud enough for speech, and the level of the loudest speech."""
    second = cfg.sampling_rate / cfg.hop_length
    # Clicks and thumps do not last.
    steady = median_filter(level, 2 * round(0.13 * second) + 1)
    top, near = steady.max(), maximum_filter1d(steady, round(2 * second))
    # Who speaks softly is heard beside who shouts, and a pause is none of both, nor is noise all the time.
    faint, noise = np.maximum(near, top - 10) - cfg.trim_db, min(steady.min() + 6, top + 10 - cfg.trim_db)
    loud = (near >= top - cfg.trim_db) & (steady >= faint) & (steady >= noise)
    return loud, top


def with_margins(loud, cfg):
    """The numbers of loud frames and of those beside: 50 ms before, 100 ms after, 0.25 s of a pause."""
    second = cfg.sampling_rate / cfg.hop_length
    first, last = np.flatnonzero(loud)[[0, -1]]
    kept = np.flatnonzero(maximum_filter1d(loud, round(second / 4)))
    return kept[(kept >= first - 0.05 * second) & (kept <= last + 0.1 * second)]


def spread_of(level):
    """How many dB lie between the quiet and the loud frames of levels (T,)."""
    return np.subtract(*np.percentile(level, (95, 10)))


def is_narrow(power, cfg):
    """Whether mel power (T, M), 1 where speech is loudest, has next to nothing above 4 kHz, as in calls."""
    _, bank = window_and_bank(cfg.sampling_rate, cfg.n_fft, cfg.n_mels)
    below = bank[:round(4200 * cfg.n_fft / cfg.sampling_rate)].any(dim=0).numpy()  # (M,)
    upper = power[:, ~below].sum(axis=1)
    return not below.all() and bool(np.percentile(upper, 95) < 10**-4.5)


def window_frames(cfg):
    """The frames of a window of CLIP_SECONDS."""
    return round(cfg.clip_seconds * cfg.sampling_rate / cfg.hop_length)


LONGEST = 6.0  # seconds of speech for which one window stands, as in training


def cuts_of(frames, cfg):
    """The first frame, and the one after the last, of each window of a clip of so many frames.

    It is whole up to LONGEST, else cut into CLIP_SECONDS that overlap by half.
    """
    size = frames
    # Up to LONGEST the model itself chooses its window in the middle, as in training.
    if frames > LONGEST * cfg.sampling_rate / cfg.hop_length + 1:
        size = min(window_frames(cfg), frames)
    starts = [*range(0, frames - size, max(1, size // 2)), frames - size]
    return [(start, start + size) for start in starts]


def windows_of(clips, cfg):
    """Clips as windows, a row for each of `cuts_of`.

    Adds `start` and `end` in s and `voiced`, the share of frames with voice; `mel` (T, M) and `samples` (n,)
    are the window's.
    """
    second, hop, windows = cfg.sampling_rate / cfg.hop_length, cfg.hop_length, []
    for clip in clips.to_dict("records"):
        mel, samples, seconds = clip["mel"], clip["samples"], clip["seconds"]
        loud, _ = loud_frames(level_of(mel), cfg)
        for first, last in cuts_of(len(mel), cfg):
            windows.append(clip | {
                "start": seconds[first],
                "end": seconds[last - 1] + 1 / second,
                "voiced": float(loud[first:last].mean()),
                "mel": mel[first:last],
                "samples": samples[first * hop:last * hop]})
    known = clips.dtypes.drop("seconds")
    return pd.DataFrame(windows, columns=[*known.index, "start", "end", "voiced"]).astype(known)


def level_of(mel):
    """The level in dB of each frame (T,) of a log-mel spectrogram (T, M)."""
    return 10 * np.log10(np.exp(mel.astype(np.float32)).sum(axis=1))


# %% 8. Text features
# Thai, Lao, Myanmar, Khmer, Kana and Han: scripts without spaces between words.
SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"


def words_in(text):
    """The lower-case words of a text, or characters where none has spaces; nothing is one unknown word."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    # Letters, the marks that belong to them, and numbers make words.
    signs = {letter for letter in text if unicodedata.category(letter)[0] not in "LMN"} - {"'", "_"}
    plain = text.translate(dict.fromkeys(map(ord, signs), " "))
    return re.findall(rf"[{SPACELESS}]|(?=[\w'])[^ {SPACELESS}]+", plain) or ["<unk>"]


def load_transformers():
    """The package, which says nothing but errors, or a UserError that says how to go on without it."""
    transformers = load_package("transformers", "pip install transformers or go without: "
                                "--run-models cnn,rnn,fusion_rnn", "AutoModel")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def loading(flag, name, without):
    """In here a pretrained encoder is loaded; what goes wrong is a UserError that says what to do."""
    try:
        with torch.random.fork_rng(devices=[]):  # loading must draw nothing of what a seed means
            yield
    except UserError:  # which says so already
        raise
    except Exception as error:  # the hub's clients raise many kinds, and networks that are no encoders too
        reason = str(error).split("\n")[0]
        raise UserError(f"{flag} {name} cannot be loaded ({reason}): name a folder with {flag} "
                        f"FOLDER, or go without: --run-models {without}") from error


def load_pretrained(name):
    """The network of a hub name or folder, with all its weights; raises anything, so within `loading`."""
    module, info = load_transformers().AutoModel.from_pretrained(name, output_loading_info=True)
    # Weights that are lacking would be random; some are not used here.
    lacking = [key for key in info["missing_keys"] if not re.search("pooler|masked_spec_embed", key)]
    refuse({f"it lacks the weights of {min(lacking, default='')} and others": lacking}, ValueError)
    return module.float().eval()


@functools.lru_cache(maxsize=2)
def load_text_encoder(name):
    """A pretrained DistilBERT-like encoder: (configuration, tokenizer JSON, module). Raises UserError."""
    with loading("--bert-model", name, "cnn,speech,rnn,fusion_rnn"):
        ids = load_transformers().AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer
        special = [ids.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
        # Others would be hidden as words.
        refuse({"it is not of BERT's family, it has other special tokens": None in special}, ValueError)
        module = load_pretrained(name)
    return json.loads(module.config.to_json_string(use_diff=False)), ids.to_str(), module


@functools.lru_cache(maxsize=2)
def encoder_digest(name):
    """A key of the content of all files in a text encoder's folder; a name of the hub stands for itself."""
    if not Path(name).is_dir():
        return name
    # By content, since a folder can be moved, and another model can lie under its name.
    files = sorted(path for path in Path(name).iterdir() if path.is_file())
    return digest(*(path.read_bytes() for path in files))


# %% 9. Speech features
# A frozen encoder: states(samples (n,) at `rate` Hz) -> (K, T, D), those of K layers; `width` is K * D, `key`
# says which weights.
SpeechWeights = namedtuple("SpeechWeights", "states rate width key")
LEVEL = 0.1  # of full scale, what the loudest twentieth of the samples exceeds that are encoded
SHORTEST = 0.4  # seconds that every encoder can hear; shorter windows are filled up with silence


@functools.lru_cache(maxsize=1)
def load_speech_encoder(name, whisper_model, device):
    """The SpeechWeights of --speech-encoder, whose key knows it by content. Raises UserError."""
    with loading("--speech-encoder", name, "cnn,rnn,fusion_rnn"):
        if name == "whisper":
            whisper, model = load_whisper(whisper_model, device)
            module, rate = model.encoder, 16000
            states = functools.partial(whisper_states, whisper, model)
        else:
            extractor = load_transformers().AutoFeatureExtractor.from_pretrained(name)
            refuse({"it is not for sound": not hasattr(extractor, "sampling_rate")}, ValueError)
            module, rate = load_pretrained(name), extractor.sampling_rate
            if module.config.is_encoder_decoder:
                module = module.get_encoder()
            module = module.to(device)
            places = getattr(getattr(module, "embed_positions", None), "weight", None)
            states = functools.partial(transformer_states, extractor, module, places)
        layers, _, width = states(np.zeros(rate, np.float32)).shape
    # By its weights, since the same ones come in several files.
    weights = (tensor.detach().cpu().numpy().tobytes() for tensor in module.parameters())
    return SpeechWeights(states, rate, layers * width, digest(*weights))


def whisper_states(whisper, model, samples):
    """States (K, T, D) of Whisper's encoder, 50 a second, of the clip alone, without padding to 30 s."""
    mel = whisper.log_mel_spectrogram(samples, model.dims.n_mels)[:, :3000].to(model.device)
    encoder = model.encoder
    with autocast(model.device.type):
        steps = F.gelu(encoder.conv1(mel[None]))
        steps = F.gelu(encoder.conv2(steps)).transpose(1, 2)  # (1, T, D)
        states = [steps + encoder.positional_embedding[:steps.shape[1]]]
        for block in encoder.blocks:
            states.append(block(states[-1]))
        states[-1] = encoder.ln_post(states[-1])
    return torch.cat(states)


def transformer_states(extractor, module, places, samples):
    """States (K, T, D) of a speech encoder of transformers, of the clip alone where it can be.

    `places` are the embeddings of all positions (P, D) of Whisper's encoder, None of others.
    """
    options = {"padding": False}
    if module.config.model_type == "audio-spectrogram-transformer":  # which has one length
        options = {}
    if places is not None:  # two frames a step
        options = {"padding": True, "pad_to_multiple_of": 2 * extractor.hop_length}
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options)
    if places is not None:  # as many as there are steps, or it refuses them
        steps = inputs["input_features"].shape[2] // 2
        module.config.max_source_positions = steps
        module.embed_positions = nn.Embedding.from_pretrained(places[:steps])
    with autocast(module.device.type):
        return torch.cat(module(**inputs.to(module.device), output_hidden_states=True).hidden_states)


def disturbed(samples, rate, kind):
    """Samples (n,) as they are (""), in noise 5 to 25 dB below them, or as a telephone carries them."""
    if kind == "telephone":
        high = min(3400, 0.45 * rate)
        return sosfilt(butter(8, (300, high), "bandpass", fs=rate, output="sos"), samples)
    if kind == "noise":
        # The same clip has the same noise each time: falling from some frequency on, so from rumble to nearly
        # white.
        rng = np.random.default_rng(zlib.crc32(samples))
        corner = rate * 2.0 ** rng.uniform(-7, -1.1)
        noise = sosfilt(butter(1, corner, fs=rate, output="sos"), rng.standard_normal(len(samples)))
        level = 10 ** (-rng.uniform(5, 25) / 20) * np.linalg.norm(samples) / np.linalg.norm(noise)
        return samples + level * noise
    return samples


@torch.inference_mode()
def speech_features(samples, view, encoder, cfg, device):
    """Time means of all layers of a frozen encoder, (K * D,), of samples (n,) at SAMPLING_RATE.

    What was computed once is read from the cache, which knows clip, view, encoder, precision and code by
    content.
    """
    speed, disturbance = view
    code = code_from("speech_features", "load_speech_encoder")
    how = cfg.sampling_rate, view, encoder.key, str(training_precision(device)), code
    path = cfg.cache / f"{digest(samples.tobytes(), *how)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or cut off
        return np.load(path)

    heard = disturbed(samples, cfg.sampling_rate, disturbance)
    heard = soxr.resample(heard, cfg.sampling_rate * speed, encoder.rate).astype(np.float32)
    # All at one level, which says more of the microphone than of the speaker, and which Whisper hears.
    heard *= LEVEL / max(1e-9, np.quantile(np.abs(heard), 0.95))
    heard = np.pad(heard, (0, max(0, round(SHORTEST * encoder.rate) - len(heard))))
    # Each clip by itself: no answer depends on what else is asked.
    features = encoder.states(heard).float().mean(dim=1).flatten().cpu().numpy()
    if cfg.phase != "predict":
        # Runs share the cache, and two may be at the same clip.
        with filelock.FileLock(cfg.cache / ".lock"), replacing(path) as temporary:
            np.save(temporary, features)
    return features


# %% 10. Batches
VIEWS = (1.0, 1.0), (0.94, 1.0), (1.06, 1.0), (1.0, 1.105), (1.0, 0.905)  # of a clip: speed, tempo


class ClipDataset(Dataset):
    """Labels of clips or windows, and what a model reads of them; indexed by rows, it gives a batch.

    Log-mel windows (B, 1, M, T) are the middle of each clip as `view` reads it (speed, tempo), or with
    `augment` a random view of it, mixed up if the model asks for it; of the words (B, L), `augment` hides
    WORD_DROPOUT. What a frozen encoder makes of a `view` of the samples is `speech` (B, D).
    """

    def __init__(self, clips, model, cfg, device, augment=False):
        self.model, self.cfg, self.device = model, cfg, device
        self.augment, self.view = augment, model.views[0]
        self.frames = window_frames(cfg)
        self.mixes = augment and cfg.mixup and "mixup" in model.settings
        self.labels = torch.tensor(clips["emotion"].cat.codes.tolist())
        targets = class_targets(clips, cfg)
        # What is mixed or weighted needs a share of each class, (N,) -> (N, C).
        soft = self.mixes or targets.max() > 1
        self.targets = targets[self.labels] if soft else self.labels

        # All log-mels in one tensor (all T, M); a clip is a first row and a length in frames.
        self.lengths = torch.tensor([len(mel) for mel in clips["mel"]])
        self.firsts = self.lengths.cumsum(0) - self.lengths
        if "mel" in model.inputs:
            self.mels = torch.from_numpy(np.concatenate([*clips["mel"]])).to(device)

        self.samples = list(clips["samples"])
        self.words = {}
        if not SOUND.issuperset(model.inputs):
            self.words = model.tokenize(list(clips["transcript"]))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        # Words are made on the CPU, log-mels where the model computes.
        words = {key: ids[rows] for key, ids in self.words.items()}
        if self.augment and words:
            words = self.hide_words(words)
        batch = {"label": self.targets[rows]} | words
        batch = {key: tensor.to(self.device) for key, tensor in batch.items()}

        if "mel" in self.model.inputs:
            batch["mel"] = self.windows(rows)
        if "speech" in self.model.inputs:
            heard = [self.samples[row] for row in rows]
            batch["speech"] = self.model.encode(heard, self.view, self.cfg, self.device)
        return mix(batch, self.cfg.mixup) if self.mixes else batch

    __getitems__ = __getitem__  # what a loader asks for a batch

    def hide_words(self, words):
        """Token ids (B, L) of which WORD_DROPOUT are hidden, but no special ones."""
        key, ids = next(iter(words.items()))
        hide = torch.rand(ids.shape) < self.cfg.word_dropout
        hide &= ~torch.isin(ids, torch.tensor(self.model.special_ids))
        return words | {key: ids.masked_fill(hide, self.model.hidden_id)}

    def windows(self, rows):
        """Log-mel windows (B, 1, M, T) of clips, as `augment` and `view` say."""
        n = len(rows)
        if self.augment:
            # The order of these draws is part of what a seed means.
            draw = functools.partial(spread, (n, 1))
            speed = torch.exp(draw(0.17))
            tempo = torch.exp(draw(0.15))
            place = torch.rand(n, 1)
            warp = torch.exp(draw(0.08))
            shift = draw(0.06)
            mel = self.read(rows, place, speed, speed * tempo, warp, shift)
            return mask(disturb(recolour(mel)))
        # The plain view needs no interpolation.
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

        # Where to read, from -1 to 1 on both axes.
        time = starts - starts.floor() + step * torch.arange(self.frames)
        time = time * 2 / (source - 1) - 1  # (B, T)
        band = bands_heard(speed, mel.shape[2], self.cfg.sampling_rate) * warp + shift  # (B, M)
        grid = torch.stack(torch.broadcast_tensors(time[:, None], band[:, :, None]), dim=3)  # (B, M, T, 2)
        return F.grid_sample(mel, grid.to(self.device).clamp(-1, 1), align_corners=True)  # as MPS can


def class_targets(clips, cfg):
    """What training aims at for each class, (C, C): its one-hot row, times its weight where it is rare."""
    sizes = torch.tensor(clips["emotion"].value_counts(sort=False).tolist())
    rarity = sizes.max() / sizes.clamp(min=1)
    # The root: weighted in full, the few clips of a rare class outdo all others, and more answers are wrong.
    uneven = cfg.class_weights and rarity.max() >= 3
    return (rarity ** (uneven / 2)).diag()


def batches_of(dataset, size, title, shuffle=False):
    """The batches of a dataset, `size` clips each, with a progress bar where they take long."""
    loader = DataLoader(dataset, size, shuffle, collate_fn=dict)  # the dataset makes whole batches
    # One iterator and no other, which tqdm would make: each draws from the generator.
    return tqdm(iter(loader), f"  {title}", len(loader), delay=10, leave=False)


def spread(shape, limit, device="cpu"):
    """Numbers drawn evenly between -limit and limit."""
    return (torch.rand(shape, device=device) * 2 - 1) * limit


def bands_heard(speed, n_mels, rate):
    """The places (B, M) on the mel axis, -1 to 1, that its bands hear at `speed` (B, 1) times the speed."""
    low, high = (math.log1p(hertz / 700) for hertz in (50, rate / 2))
    mel = torch.linspace(low, high, n_mels + 2)[1:-1]
    heard = torch.log1p(torch.expm1(mel) / speed)
    return (heard - mel[0]) * 2 / (mel[-1] - mel[0]) - 1


def bands_and_draw(mel, draw):
    """The bands (M,) of log-mel windows (B, 1, M, T), from -1 to 1; what draws a number for each, (B, 1)."""
    bands = torch.linspace(-1, 1, mel.shape[2], device=mel.device)
    return bands, functools.partial(draw, (len(mel), 1), device=mel.device)


def recolour(mel):
    """Log-mel windows (B, 1, M, T) through another room and microphone: tilt and ripple, up to 3 dB each."""
    bands, draw = bands_and_draw(mel, spread)

    # The order of these draws is part of what a seed means.
    period = 1 + draw(0.75)
    phase = draw(1)
    ripple = torch.cos(math.pi * (bands * period + phase))  # (B, M)
    decibels = draw(3) * bands + draw(3) * ripple

    log_power = decibels * math.log(10) / 10
    return mel + log_power[:, None, :, None]


def disturb(mel):
    """Log-mel windows (B, 1, M, T) through a bad line: a half in noise, a quarter without upper bands.

    Noise lies 25 to 70 dB below loud speech in the middle band, with a slope of up to 8 dB either way.
    """
    bands, draw = bands_and_draw(mel, torch.rand)
    edge = torch.where(draw() < 0.25, 0.2 + 0.8 * draw(), 1.0)  # 4 kHz is at 0.5
    mel = mel.masked_fill((bands > edge)[:, None, :, None], math.log(FLOOR))

    decibels = -70 + 45 * draw() + 8 * (2 * draw() - 1) * bands  # (B, M)
    decibels = decibels.where(draw() < 0.5, -100)
    noise = (decibels * math.log(10) / 10)[:, None, :, None]
    # Low bands are narrow: few FFT bins each, which average little of the noise away.
    unrest = torch.linspace(0.9, 0.25, len(bands), device=mel.device)[:, None]
    return torch.logaddexp(mel, noise + unrest * torch.randn_like(mel))


def mask(mel):
    """Log-mel windows (B, 1, M, T) with SpecAugment's two masks over bands and two over frames."""
    bands, frames = mel.shape[2:]
    hide = load_torchaudio().mask_along_axis_iid

    # What is hidden becomes 0, so 0 must be the average.
    mel = mel - mel.mean(dim=(2, 3), keepdim=True)
    for _ in range(2):
        mel = hide(mel, bands * 10 // 64, 0.0, axis=2)
        mel = hide(mel, frames // 10, 0.0, axis=3)
    return mel


def mix(batch, strength):
    """Mixup (Zhang et al. 2018): every clip gets a random partner, one Beta-distributed weight a batch."""
    weight = float(torch.distributions.Beta(strength, strength).sample())
    order = torch.randperm(len(batch["label"]), device=batch["label"].device)
    return {key: weight * value + (1 - weight) * value[order] for key, value in batch.items()}


# %% 11. Models
SOUND = {"mel", "speech"}  # the batch keys that are made of sound; all others are made of words


class Encoder(nn.Module):
    """What all models share: features, classified by a head; the unimodal ones pool them from a sequence.

    A subclass names the batch keys that it reads in `inputs`, the settings that its training depends on
    beside those of every training in `settings`, and the suffix of its own constants (EPOCHS_CNN) in
    `suffix`, and those that name pretrained weights in `pretrained`. It answers as the mean of its `views`.
    Its training `draws` views of whole clips. It has a `head`, and defines `sequence(batch)`, steps of
    `step_width`, and `pool(sequence, mask)`, features of `width`. `spec` holds the constructor's arguments as
    builtins, for the checkpoint.
    """

    inputs, settings, pretrained, suffix, views, draws = (), (), (), "", VIEWS[:1], True

    def __init__(self, **spec):
        super().__init__()
        self.spec = spec
        self.dropout = nn.Dropout(spec["dropout"])

    @classmethod
    def prepare(cls, cfg):
        """Load the pretrained weights that it starts from. Raises UserError where they cannot be had."""

    @classmethod
    def check(cls, spec, cfg):
        """Raise a UserError when a trained model lacks what its checkpoint does not hold."""

    @classmethod
    def start(cls, shape, clips, cfg, parts):
        """A model ready for training, of `shape` (classes, dropout); called right after the seed is set."""
        return cls(**shape)

    @classmethod
    def depends_on(cls, cfg):
        """What the training of this class depends on, beside clips, seed and code, as a dict."""
        names = [*TRAINING, f"epochs_{cls.suffix}", f"learning_rate_{cls.suffix}", *cls.settings]
        return {name: getattr(cfg, name) for name in names}

    def fit(self, training, validation, cfg, device, path, fingerprint):
        """The trained model and its history, a dict per epoch. Raises UserError."""
        return fit_in_epochs(self, training, validation, cfg, device, path, fingerprint)

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

        self.body = nn.Sequential(
            *normed(inputs, outputs, 3, stride, 1),
            nn.ReLU(),
            *normed(outputs, outputs, 3, 1, 1))
        self.shortcut = nn.Sequential(*normed(inputs, outputs, 1, stride))
        self.gate = None
        if squeeze:
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(outputs, outputs // 8, 1),
                nn.ReLU(),
                nn.Conv2d(outputs // 8, outputs, 1),
                nn.Sigmoid())

    def forward(self, x):
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = self.body(x)
        if self.gate is not None:
            y = y * self.gate(y)
        return F.relu(y + self.shortcut(x))


class AudioCNN(Encoder):
    """A 2-D CNN on log-mel windows, four bands of them kept apart, a GRU over time, attentive statistics."""

    inputs, suffix, views = ("mel",), "cnn", VIEWS
    settings = ("n_mels", "n_fft", "mixup")
    step_width, width = 128, 256

    def __init__(self, classes, dropout):
        super().__init__(classes=classes, dropout=dropout)
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            ResidualBlock(32, 64, 2),
            ResidualBlock(64, 128, 2),
            ResidualBlock(128, 128, (2, 1), squeeze=True),
            nn.AdaptiveAvgPool2d((4, None)))  # does something where there are not 64 mel bands
        self.project = nn.Sequential(
            nn.Conv1d(4 * 128, 128, 1, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU())
        self.recurrent = nn.GRU(128, 64, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(
            nn.Linear(128, 64),
            nn.Tanh(),
            nn.Linear(64, 1))
        self.head = nn.Linear(self.width, classes)

    def sequence(self, batch):
        """mel (B, 1, M, T) -> steps (B, S, 128), S = T / 8, and their mask (B, S), all true."""
        # Each window by itself: loudness says nothing.
        deviation, mean = torch.std_mean(batch["mel"], dim=(2, 3), keepdim=True)
        x = (batch["mel"] - mean) / (deviation + 1e-5)

        # Frequency is not pooled away: four bands go into the recurrent layer side by side.
        x = self.convolutions(x)  # (B, 1, M, T) -> (B, 128, 4, S)
        x = x.flatten(1, 2)  # (B, 4 * 128, S)
        x = self.project(x).transpose(1, 2)  # (B, S, 128)
        steps = x + self.recurrent(x)[0]
        return steps, torch.ones(steps.shape[:2], dtype=torch.bool, device=steps.device)

    def pool(self, steps, mask):
        """Attentive mean and standard deviation over time (Okabe et al. 2018): (B, S, 128) -> (B, 256)."""
        # No step is masked: sound has no padding.
        weight = self.attention(steps).softmax(dim=1)  # (B, S, 1)
        mean = (weight * steps).sum(dim=1)
        variance = (weight * (steps - mean[:, None]) ** 2).sum(dim=1)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


class SpeechEncoder(Encoder):
    """Logistic regression on the time means of all layers of a frozen, pretrained speech encoder.

    Trained on every clip at three speeds, in noise and through a telephone; answers as the mean of the
    speeds. `encoder` is the key of the frozen weights, which are named here and not copied; `width` is that
    of its layers together.
    """

    inputs, suffix, pretrained = ("speech",), "speech", ("whisper_model", "speech_encoder")
    views = (1.0, ""), (0.9, ""), (1.1, "")  # speed, disturbance
    training_views, draws = (*views, (1.0, "noise"), (1.0, "telephone")), False

    def __init__(self, classes, dropout, encoder, width):
        super().__init__(classes=classes, dropout=dropout, encoder=encoder, width=width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.head = nn.Linear(width, classes)

    @classmethod
    def prepare(cls, cfg):
        """The frozen encoder that the settings name."""
        return load_speech_encoder(cfg.speech_encoder, cfg.whisper_model, pick_device(cfg))

    @classmethod
    def check(cls, spec, cfg):
        """Its encoder must be there, and be the one of the training."""
        refuse({f"SpeechEncoder was trained with another encoder than that of --whisper-model "
                f"{cfg.whisper_model} --speech-encoder {cfg.speech_encoder}: name that one, or train with "
                "--phase all": cls.prepare(cfg).key != spec["encoder"]})

    @classmethod
    def start(cls, shape, clips, cfg, parts):
        """For the encoder that the settings name."""
        encoder = cls.prepare(cfg)
        return cls(**shape, encoder=encoder.key, width=encoder.width)

    @classmethod
    def depends_on(cls, cfg):
        """Its one setting, and the encoder by content, whatever its name."""
        return {"speech_c": cfg.speech_c, "speech encoder": cls.prepare(cfg).key}

    def encode(self, clips, view, cfg, device):
        """A view of clips, samples (n,) each at SAMPLING_RATE, as its encoder hears it: (N, D)."""
        encoder = self.prepare(cfg)
        speech = [speech_features(samples, view, encoder, cfg, device) for samples in clips]
        return torch.from_numpy(np.stack(speech)).to(device)

    def standardize(self, dataset, views):
        """Take mean and deviation from some views of a dataset; returns its features (V * N, D)."""
        speech = []
        for dataset.view in views:
            speech += [batch["speech"] for batch in batches_of(dataset, 64, "encoding")]
        speech = torch.cat(speech)
        deviation, self.mean = torch.std_mean(speech, dim=0)
        self.deviation = deviation.clamp(min=1e-6)  # some features of some encoders never change
        return self.features({"speech": speech})

    def features(self, batch):
        """speech (B, D), standardised as that of the training clips: (B, D)."""
        return (batch["speech"] - self.mean) / self.deviation

    def fit(self, training, validation, cfg, *_):
        """(the model, []): what is solved at once has no history."""
        from sklearn.linear_model import LogisticRegression
        features = self.standardize(training, self.training_views)
        label = training.labels.repeat(len(self.training_views))

        # A strong penalty, for more features than clips; every emotion weighs the same, as in UAR.
        head = LogisticRegression(C=cfg.speech_c, class_weight="balanced", max_iter=1000)
        head.fit(features.cpu(), label)
        # Of two classes, scikit-learn has the second alone.
        rows = head.classes_[-len(head.coef_):]
        for parameter, values in ((self.head.weight, head.coef_), (self.head.bias, head.intercept_)):
            parameter.data.zero_()
            parameter.data[rows] = torch.from_numpy(values).to(parameter)
        return self, []


def masked_mean(steps, mask):
    """Mean over the steps (B, S, D) whose mask (B, S) is true: (B, D)."""
    mask = mask[..., None].to(steps.dtype)
    return (steps * mask).sum(dim=1) / mask.sum(dim=1)


class TextRNN(Encoder):
    """Word embeddings, a bidirectional LSTM, mean and maximum over the words."""

    inputs, suffix = ("tokens",), "rnn"
    settings = ("word_dropout", "max_tokens")
    step_width, width = 128, 256
    hidden_id, special_ids = 1, [0]

    def __init__(self, classes, dropout, vocabulary, max_tokens):
        super().__init__(classes=classes, dropout=dropout, vocabulary=vocabulary, max_tokens=max_tokens)
        self.ids = {word: index for index, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary), 100, padding_idx=0)
        self.recurrent = nn.LSTM(100, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(self.width, classes)

    @classmethod
    def start(cls, shape, clips, cfg, parts):
        """With the words of the training split as its vocabulary."""
        texts = clips.loc[clips["split"] == "train", "transcript"]
        words = set(words_in(" ".join(texts))) - {"<unk>"}
        return cls(**shape, vocabulary=["<pad>", "<unk>", *sorted(words)], max_tokens=cfg.max_tokens)

    def tokenize(self, texts):
        """Texts -> {"tokens": (N, L)}, padded with 0 to the longest."""
        rows = []
        for text in texts:
            words = words_in(text)[:self.spec["max_tokens"]]
            rows.append(torch.tensor([self.ids.get(word, 1) for word in words]))
        return {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def sequence(self, batch):
        """tokens (B, L) -> steps (B, L, 128) and the mask of words (B, L); padding is never read."""
        mask = batch["tokens"] != 0
        embedded = self.dropout(self.embedding(batch["tokens"]))
        lengths = mask.sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, True, enforce_sorted=False)
        steps, _ = self.recurrent(packed)
        return nn.utils.rnn.pad_packed_sequence(steps, True, total_length=mask.shape[1])[0], mask

    def pool(self, steps, mask):
        """(B, L, 128) -> (B, 256)."""
        # One strong word can decide, whatever the mean says.
        most = steps.masked_fill(~mask[..., None], -math.inf).amax(dim=1)
        return torch.cat([masked_mean(steps, mask), most], dim=1)


class TextBERT(Encoder):
    """A pretrained DistilBERT-like encoder, fine-tuned whole, mean-pooled over its tokens."""

    inputs, suffix = ("input_ids", "attention_mask"), "bert"
    settings, pretrained = ("word_dropout", "max_tokens"), ("bert_model",)

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

    @classmethod
    def prepare(cls, cfg):
        """The weights, configuration and tokenizer of --bert-model."""
        return load_text_encoder(cfg.bert_model)

    @classmethod
    def start(cls, shape, clips, cfg, parts):
        """With the weights and the tokenizer of --bert-model."""
        config, tokenizer, pretrained = cls.prepare(cfg)
        model = cls(**shape, config=config, tokenizer=tokenizer, max_tokens=cfg.max_tokens)
        model.encoder.load_state_dict(pretrained.state_dict())
        return model

    @classmethod
    def depends_on(cls, cfg):
        """Also the content of --bert-model, whatever its name."""
        return super().depends_on(cfg) | {"encoder": encoder_digest(cfg.bert_model)}

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


# %% 12. Early fusion
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

    `parts` maps short names to specs, one that hears and one that reads. Features of training clips are
    memorised, so the head is fitted on disturbed sound and words, and every other clip loses one of the two:
    it must learn to use either, and could answer batches that lack the keys of one.
    """

    settings, suffix, attends = ("word_dropout",), "fusion", False

    def __init__(self, classes, dropout, parts):
        super().__init__(classes=classes, dropout=dropout, parts=parts)
        models = {name: SYSTEMS[name].kind(**spec) for name, spec in parts.items()}
        self.encoders = nn.ModuleDict(models)
        self.encoders.requires_grad_(False)
        # The parts stand in the order of SYSTEMS: sound first.
        (sound, hearing), (words, reading) = models.items()
        self.inputs = hearing.inputs + reading.inputs
        self.tokenize = reading.tokenize
        self.special_ids, self.hidden_id = reading.special_ids, reading.hidden_id

        self.norms = nn.ModuleDict({name: nn.LayerNorm(part.width) for name, part in models.items()})
        self.cross = nn.ModuleDict()
        if self.attends:
            self.cross[sound] = CrossAttention(hearing.step_width, reading.step_width, dropout)
            self.cross[words] = CrossAttention(reading.step_width, hearing.step_width, dropout)
        self.head = nn.Sequential(
            nn.Linear(hearing.width + reading.width, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, classes))

    @classmethod
    def start(cls, shape, clips, cfg, parts):
        """With its parts as they were trained; restoring them after the seed belongs to the draws."""
        trained = {name: restore(checkpoint) for name, checkpoint in parts.items()}
        model = cls(**shape, parts={name: part.spec for name, part in trained.items()})
        for name, part in trained.items():
            model.encoders[name].load_state_dict(part.state_dict())
        return model

    def train(self, mode=True):
        """Training mode for the head alone: the encoders stay as they were trained."""
        super().train(mode)
        self.encoders.eval()
        return self

    def features(self, batch):
        """The features of both parts, normalised and joined, zeros for what is missing: (B, D)."""
        size = len(next(iter(batch.values())))
        device = self.head[0].weight.device
        chance = torch.full((size,), 0.5).to(device)
        if self.training:
            chance = torch.rand(size, device=device)
        sound, words = self.encoders
        kept = {sound: chance > 0.25, words: chance < 0.75}  # (B,) each

        # The parts are frozen: no gradient flows into them.
        with torch.no_grad():
            sequences = {name: part.sequence(batch) for name, part in self.encoders.items()
                         if set(part.inputs) <= set(batch)}
        joined = []
        for name, other in ((sound, words), (words, sound)):
            part = self.encoders[name]
            pooled = torch.zeros(size, part.width, device=device)
            if name in sequences:
                steps, mask = sequences[name]
                if self.cross and other in sequences:
                    others, present = sequences[other]
                    steps = self.cross[name](steps, others, present & kept[other][:, None])
                pooled = part.pool(steps, mask) * kept[name][:, None]
            joined.append(self.norms[name](pooled))
        return torch.cat(joined, dim=1)


class AttentionFusion(EarlyFusion):
    """Early fusion whose steps attend to those of the other modality first."""

    attends = True


# %% 13. Training and inference
# What every training depends on, and what those in epochs depend on too.
SHARED = "seed", "sampling_rate", "channel", "trim_db", "clip_seconds", "hop_length"
OF_SOUND = "n_mels", "n_fft"  # and what hears: log-mels decide which frames are loud enough to be kept
TRAINING = "batch_size", "weight_decay", "dropout", "label_smoothing", "ema_decay", "class_weights"


def training_precision(device):
    """The lower precision that training on this device gains from, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")]
    return torch.bfloat16 if device == "cpu" and any(has) else torch.float32


def autocast(device):
    """A context in which networks compute in the lower precision that this device gains from, if any."""
    precision = training_precision(device)
    return torch.autocast(device, precision, enabled=precision != torch.float32)


class Trainer:
    """Takes one optimiser step after another; `average`, the moving average of the weights, is the result."""

    def __init__(self, model, cfg, steps, device):
        self.model, self.device = model, device
        # Weight decay is for matrices; biases and norms go without.
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

        rate = getattr(cfg, f"learning_rate_{model.suffix}")
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=cfg.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, steps, pct_start=0.15)
        self.scaler = torch.amp.GradScaler(device, enabled=training_precision(device) == torch.float16)
        self.loss = nn.CrossEntropyLoss(label_smoothing=cfg.label_smoothing)
        # A copy's recurrent weights lie apart, of which cuDNN warns; moving it, if only in place, joins them.
        self.average, self.ema_decay = copy.deepcopy(model).to(device), cfg.ema_decay
        self.parts = {"model": model, "average": self.average, "optimizer": self.optimizer,
                      "schedule": self.schedule, "scaler": self.scaler}
        self.generators = [torch] if device == "cpu" else [torch, getattr(torch, device)]

    def state(self):
        """All that the next step depends on, as tensors and builtins."""
        parts = {key: trained_state(part) for key, part in self.parts.items()}
        generators = [source.get_rng_state() for source in self.generators]
        return parts | {"generators": generators}

    def load(self, state):
        """Take over what `state()` gave; a state of something else raises almost anything."""
        for key, part in self.parts.items():
            if trained_state(part).keys() != state[key].keys():
                raise KeyError(key)
            part.load_state_dict(part.state_dict() | state[key])
        for source, value in zip(self.generators, state["generators"]):
            source.set_rng_state(value)

    @torch.no_grad()
    def update_average(self):
        """Move the average towards the model; faster at first, so that a short training forgets its start."""
        steps = self.schedule.last_epoch
        decay = min(self.ema_decay, steps / (9 + steps))
        for average, current in zip(self.average.state_dict().values(), self.model.state_dict().values()):
            if average.is_floating_point():
                current = average.lerp(current, 1 - decay)
            average.copy_(current)

    def step(self, batch):
        """Train on one batch; returns (loss, share of clips whose strongest label was found)."""
        with autocast(self.device):
            logits = self.model(batch)
            loss = self.loss(logits.float(), batch["label"])

        # The scaler does nothing except in float16, where small gradients would vanish.
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.update_average()

        label = batch["label"]
        if label.ndim == 2:  # mixed
            label = label.argmax(dim=1)
        return float(loss.detach()), float((logits.argmax(dim=1) == label).float().mean())


def trained_state(part):
    """The state of a model, optimiser or the like, without the tensors of a fusion's frozen parts."""
    return {key: value for key, value in part.state_dict().items() if not key.startswith("encoders.")}


def resume(trainer, path, fingerprint):
    """The history so far of the training whose state lies at `path`, taken over by `trainer`; [] if none."""
    if not path.exists():
        return []
    # A state that turns out to be broken half-way must leave no trace.
    untouched = copy.deepcopy(trainer.state())
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        reason = differences(state["fingerprint"], fingerprint)
        if not reason:
            trainer.load(state["trainer"])
            return state["history"]
    except Exception as error:  # truncated, foreign and hostile files raise many kinds
        trainer.load(untouched)
        reason = f"not usable, {type(error).__name__}"
    print(f"  {path} is passed over ({reason}): training starts anew")
    return []


def train(kind, parts, clips, cfg, device, state, fingerprint):
    """(a model of a class, trained on the clips of a run; its history by epoch). Raises UserError.

    `parts` holds the checkpoints of its parts. Every epoch leaves its state at the path `state`; the next
    call with the same fingerprint goes on from there.
    """
    torch.manual_seed(cfg.seed)
    shape = {"classes": len(classes_of(clips)), "dropout": cfg.dropout}
    model = kind.start(shape, clips, cfg, parts)
    model = model.to(device, memory_format=torch.channels_last)  # faster convolutions

    # Training draws from the whole clip where it can, all else hears windows as prediction does.
    training = clips[clips["split"] == "train"]
    if not kind.draws:
        training = windows_of(training, cfg)
    validation = windows_of(clips[clips["split"] == "validation"], cfg)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"  {size:,} trained parameters, {len(training)} clips", flush=True)
    return model.fit(ClipDataset(training, model, cfg, device, augment=True),
                     ClipDataset(validation, model, cfg, device), cfg, device, state, fingerprint)


def fit_in_epochs(model, training, validation, cfg, device, path, fingerprint):
    """Train for the full schedule; the averaged model and a history, a dict per epoch. Raises UserError."""
    epochs = getattr(cfg, f"epochs_{model.suffix}")
    steps = epochs * math.ceil(len(training) / cfg.batch_size)
    trainer = Trainer(model, cfg, steps, device)
    fingerprint = fingerprint | {"device": f"{device} {training_precision(device)}"}
    history = resume(trainer, path, fingerprint)
    if history:
        print(f"  goes on after epoch {len(history)} of {epochs}")

    print("  epoch  train loss  train acc   val loss    val acc    val UAR  seconds  min left")
    try:
        while len(history) < epochs:
            epoch = fit_epoch(trainer, training, validation, len(history) + 1)
            # Written first: what is said to be finished is on disk.
            with replacing(path) as temporary:
                state = {"fingerprint": fingerprint, "history": [*history, epoch], "trainer": trainer.state()}
                torch.save(state, temporary)
            history.append(epoch)
            line = "  {:5d} {:11.3f} {:10.1%} {:10.3f} {:10.1%} {:10.1%} {:8.1f} {:9.1f}"
            minutes = (epochs - len(history)) * epoch["seconds"] / 60
            print(line.format(*epoch.values(), minutes), flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after epoch {len(history)} of {epochs}; the same command goes on "
                                "from there") from None
    return trainer.average, history


def fit_epoch(trainer, training, validation, number):
    """Train for one epoch; its row of the history, a dict. Raises UserError when the loss is not finite."""
    start = time.perf_counter()
    trainer.model.train()
    batches = batches_of(training, training.cfg.batch_size, f"epoch {number}", shuffle=True)
    loss, accuracy = np.mean([trainer.step(batch) for batch in batches], axis=0).tolist()
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} in epoch {number}: lower "
                        f"--learning-rate-{trainer.model.suffix}")

    # One pass over validation an epoch, no more: every pass draws from the generator.
    logits, labels = logits_of(trainer.average, validation), validation.labels
    found = logits.argmax(dim=1)
    return {
        "epoch": number,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "validation_loss": float(F.cross_entropy(logits, labels)),
        "validation_accuracy": float((found == labels).float().mean()),
        "validation_uar": recall(labels.numpy(), found.numpy()),
        "seconds": time.perf_counter() - start}


@torch.inference_mode()
def logits_of(model, dataset):
    """Logits (N, C) in float32 on the CPU, in the dataset's order."""
    model.eval()
    return torch.cat([model(batch).float().cpu() for batch in batches_of(dataset, 64, "answers")])


def infer(model, windows, cfg, device):
    """What a model says to windows: log-probabilities (V, W, C), uncalibrated, one for each of its views."""
    # All views are stored, so that TEST_VIEWS is no setting of a training.
    dataset, log_probs = ClipDataset(windows, model, cfg, device), []
    for view in model.views:
        dataset.view = view
        log_probs.append(logits_of(model, dataset).log_softmax(dim=1))
    return torch.stack(log_probs)


def recall(true, predicted):
    """UAR: the mean of the recalls of the classes that occur in `true` (N,)."""
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


def differences(old, new):
    """What changed between two fingerprints, as text; empty when nothing did."""
    changed = {key: f"{old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value}
    readable = {*Settings._fields, "device"}  # other keys are digests of some content
    return ", ".join(f"{key} {change if key in readable else 'changed'}" for key, change in changed.items())


# %% 14. Systems: whoever answers
def mean_of(probabilities, weights):
    """Late fusion: the mean of the probabilities (P, N, C) of the parts: (N, C)."""
    return probabilities.mean(axis=0)


def weighted(probabilities, weights):
    """Learned late fusion: softmax of weighted log-probabilities, (P, N, C) and weights (P,): (N, C)."""
    return softmax(np.tensordot(weights, np.log(probabilities.clip(1e-7)), 1), axis=1)


def ensemble(log_probs, temperature):
    """Several seeds as one: the calibrated probabilities of their mean log-probabilities (N, C)."""
    return softmax(log_probs / temperature, axis=1)


def adapted(windows, checkpoint, cfg, device):
    """SpeechEncoder standardised by other clips of the same corpus, without labels: log-probs (V, W, C).

    Where there are four speakers and more, those of a window's own speaker do not count; where none are
    named, those of its own clip.
    """
    model = restore(checkpoint).to(device)
    speaker = pd.factorize(voices_of(windows), sort=True)[0]
    groups = speaker % 4
    log_probs = torch.empty(len(model.views), len(windows), len(checkpoint.classes))
    for group in set(groups):
        scored = groups == group
        others = windows[~scored] if speaker.max() > 2 else windows
        model.standardize(ClipDataset(others, model, cfg, device), model.views)
        log_probs[:, scored] = infer(model, windows[scored], cfg, device)
    return log_probs


# A class is trained; a function is made of the answers of its parts. Parts stand first.
System = namedtuple("System", "title file kind parts", defaults=[()])
SYSTEMS = {
    "cnn": System("AudioCNN", "AudioCNN", AudioCNN),
    "speech": System("SpeechEncoder", "SpeechEncoder", SpeechEncoder),
    "cnn_ensemble": System("AudioCNN, ensemble", "AudioCNN_ensemble", ensemble, ("cnn",)),
    "speech_adapted": System("SpeechEncoder, adapted: uses unlabelled clips of this corpus",
                             "SpeechEncoder_adapted", adapted, ("speech",)),
    "rnn": System("TextRNN", "TextRNN", TextRNN),
    "bert": System("TextBERT", "TextBERT", TextBERT),
    "fusion_rnn": System("Early fusion, RNN", "EarlyFusion_RNN", EarlyFusion, ("cnn", "rnn")),
    "fusion_bert": System("Early fusion, BERT", "EarlyFusion_BERT", EarlyFusion, ("cnn", "bert")),
    "attention_rnn": System("Attention fusion, RNN", "AttentionFusion_RNN", AttentionFusion, ("cnn", "rnn")),
    "attention_bert": System("Attention fusion, BERT", "AttentionFusion_BERT", AttentionFusion,
                             ("cnn", "bert")),
    "late_speech": System("Late fusion, CNN and speech", "LateFusion_Speech", mean_of, ("cnn", "speech")),
    "learned_speech": System("Learned late fusion, CNN and speech", "LearnedFusion_Speech", weighted,
                             ("cnn", "speech")),
    "late_rnn": System("Late fusion, RNN", "LateFusion_RNN", mean_of, ("cnn", "rnn")),
    "late_bert": System("Late fusion, BERT", "LateFusion_BERT", mean_of, ("cnn", "bert")),
    "learned_rnn": System("Learned late fusion, RNN", "LearnedFusion_RNN", weighted, ("cnn", "rnn")),
    "learned_bert": System("Learned late fusion, BERT", "LearnedFusion_BERT", weighted, ("cnn", "bert")),
    "late_speech_rnn": System("Late fusion, speech and RNN", "LateFusion_Speech_RNN", mean_of,
                              ("speech", "rnn")),
    "late_speech_bert": System("Late fusion, speech and BERT", "LateFusion_Speech_BERT", mean_of,
                               ("speech", "bert")),
    "learned_speech_rnn": System("Learned late fusion, speech and RNN", "LearnedFusion_Speech_RNN", weighted,
                                 ("speech", "rnn")),
    "learned_speech_bert": System("Learned late fusion, speech and BERT", "LearnedFusion_Speech_BERT",
                                  weighted, ("speech", "bert")),
}
TRAINED = {name: system for name, system in SYSTEMS.items() if isinstance(system.kind, type)}


def inputs_of(name):
    """The batch keys that a system or its parts read."""
    system = SYSTEMS[name]
    inputs = set(getattr(system.kind, "inputs", ()))
    return inputs.union(*map(inputs_of, system.parts))


def reads_words(name):
    """Whether a system or one of its parts reads words."""
    return not inputs_of(name) <= SOUND


# %% 15. Checkpoints: a training is one file
# `log_probs` (V, W, C) are those of every view and window of train, validation and test, uncalibrated;
# `windows` says clip, split, emotion, voice and digest of each. So temperatures, fusion weights and tables
# are made anew from checkpoints alone, in seconds.
Checkpoint = namedtuple("Checkpoint", "system spec weights classes words caveats settings fingerprint "
                        "history windows log_probs")
TRAIN_AGAIN = "train with --phase all, or name another --output-dir"
PREVIOUS = "_best.previous.pth"  # ends the name of the checkpoint that the last training replaced


def file_of(cfg, name, ending="_best.pth"):
    """The path of a file of a system: its checkpoint, or another one by its ending."""
    return Path(cfg.output_dir, f"{SYSTEMS[name].file}{ending}")


def read_checkpoint(cfg, name, ending="_best.pth"):
    """The Checkpoint of a system, tensors left on disk until used. Raises UserError."""
    path = file_of(cfg, name, ending)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "temperature" in content:
            reason = "was made by an older version: train again, the file is kept"
        elif SYSTEMS[content["system"]] != SYSTEMS[name]:
            reason = f"is of another system: {TRAIN_AGAIN}"
        else:
            return Checkpoint(**content)
    except FileNotFoundError:
        reason = f"does not exist: {TRAIN_AGAIN}"
    except Exception as error:  # truncated, foreign and hostile files raise many kinds
        reason = f"is not a usable checkpoint ({type(error).__name__}): {TRAIN_AGAIN}"
    raise UserError(f"{path} {reason}")


def restore(checkpoint):
    """The model of a Checkpoint, on the CPU, in evaluation mode. Raises UserError."""
    try:
        model = SYSTEMS[checkpoint.system].kind(**checkpoint.spec)
        model.load_state_dict(checkpoint.weights)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{SYSTEMS[checkpoint.system].title} was made by another version of this script: "
                        f"{TRAIN_AGAIN}") from error
    return model.eval()


def fingerprint_of(cfg, name, clips):
    """What a training depends on, as a flat dict of texts: two trainings with the same are the same.

    Settings stand as they are; clips, transcripts, code and parts as keys of their content.
    """
    system = SYSTEMS[name]
    of_sound = OF_SOUND * (not SOUND.isdisjoint(system.kind.inputs))
    settings = {key: getattr(cfg, key) for key in SHARED + of_sound} | system.kind.depends_on(cfg)
    fingerprint = {key: str(value) for key, value in settings.items()}
    # A line a window: log-probabilities of models with other windows of the same clips cannot be joined.
    windows = [len(cuts_of(len(mel), cfg)) for mel in clips["mel"]]
    lines = clips.loc[clips.index.repeat(windows), ["clip", "digest", "emotion", "split"]]
    fingerprint["clips"] = digest(lines.to_csv(index=False))
    if reads_words(name):
        fingerprint["transcripts"] = digest(list(clips["transcript"]))
    # A part stands for all that it depends on itself.
    for part in system.parts:
        fingerprint[part] = digest(read_checkpoint(cfg, part).fingerprint)

    return fingerprint | {"code": code_of(name)}


class WithoutDocstrings(ast.NodeTransformer):
    """Takes the docstrings out of syntax trees; comments are in no tree at all."""

    def visit_Expr(self, node):
        """The statement, or None for a text that stands alone."""
        return None if isinstance(node.value, ast.Constant) else node


@functools.cache
def definitions():
    """The top-level definitions of this file as syntax trees by name; {} in a notebook, which has no file."""
    found = {}
    for node in WithoutDocstrings().visit(ast.parse(source_code())).body:
        defined = getattr(node, "targets", [node])[0]
        found[getattr(defined, "id", getattr(defined, "name", ""))] = node
    return found


def code_of(name):
    """A key of the code that the training of a system depends on, without docstrings; "" in a notebook.

    That is its class, the trainer, its features, and what these lead to. So an edited plot changes no
    training, and an edited mel filter changes all that hear.
    """
    features = ["load_clip"] * bool(inputs_of(name) & SOUND)
    return code_from(SYSTEMS[name].kind.__name__, "train", "infer", *features)


@functools.cache
def code_from(*roots):
    """A key of some definitions and what they lead to by name; "" in a notebook.

    As long as it stands between `Corpus` and `SYSTEMS`: what is above and below finds files, draws, reports.
    """
    todo, seen = [*roots], {}
    # The order of the file is the border: science stands between two landmarks.
    names = list(definitions())
    science = names[names.index("Corpus"):names.index("SYSTEMS")] if names else []
    while todo:
        definition = todo.pop()
        if definition in science and definition not in seen:
            tree = definitions()[definition]
            seen[definition] = ast.dump(tree)
            todo += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return digest(seen) if seen else ""


def stale_because(cfg, name, clips, ending="_best.pth"):
    """Why a system must be trained, in words; "" when its checkpoint can be used again."""
    if not file_of(cfg, name, ending).exists():
        return "not trained yet"
    try:
        old, new = read_checkpoint(cfg, name, ending), fingerprint_of(cfg, name, clips)
    except UserError as error:
        return str(error)
    if cfg.reuse_edited or not new["code"]:  # a notebook has no code to compare
        del new["code"]
    changes = differences(old.fingerprint, new)
    longer = len(old.history) > int(new.get(f"epochs_{SYSTEMS[name].kind.suffix}", 1))
    if changes and longer:
        changes += ", in place of a longer training: another --output-dir keeps both"
    return changes


def take_back(cfg, name, clips):
    """Swap a checkpoint with the one that it replaced, if that is what is asked for; whether it did."""
    if stale_because(cfg, name, clips, PREVIOUS):
        return False
    # Killed in between, what was asked for is still found.
    path, previous = file_of(cfg, name), file_of(cfg, name, PREVIOUS)
    aside = path.with_suffix(".aside.pth")
    for old, new in ((path, aside), (previous, path), (aside, previous)):
        if old.exists():
            old.replace(new)
    return True


def train_system(cfg, name, clips, corpus, device):
    """Train one system on the clips of a run; leaves one file, the old one as *.previous.pth.

    Whenever it is killed, the state of its last epoch is there until the checkpoint is.
    """
    path, state = file_of(cfg, name), file_of(cfg, name, "_training.pth")
    # Before training: what is edited meanwhile is not what was trained.
    fingerprint = fingerprint_of(cfg, name, clips)
    parts = {part: read_checkpoint(cfg, part) for part in SYSTEMS[name].parts}
    print(f"\n{SYSTEMS[name].title}", flush=True)
    model, history = train(SYSTEMS[name].kind, parts, clips, cfg, device, state, fingerprint)

    # What the model says to every clip goes into its file, so that nothing else needs the corpus again.
    windows, words = windows_of(clips, cfg), corpus.words * reads_words(name)
    traits = windows[["clip", "split", "emotion", "voiced", "digest"]]
    checkpoint = Checkpoint(
        name, model.spec, model.state_dict(), classes_of(clips), words,
        caveats_of(corpus.clips, corpus.split, words, cfg), cfg._asdict(), fingerprint, history,
        traits.to_dict("list"), infer(model, windows, cfg, device))
    with replacing(path) as temporary:
        torch.save(checkpoint._asdict(), temporary)
        if path.exists():  # now that the new one is whole
            path.replace(file_of(cfg, name, PREVIOUS))
    state.unlink(missing_ok=True)


def caveats_of_models(checkpoints):
    """What every page must say of the models in {system: Checkpoint}; "trained by other code" among it."""
    caveats = {caveat: None for checkpoint in checkpoints.values() for caveat in checkpoint.caveats}
    # In a notebook code has no key.
    edited = any(len({code_of(name), checkpoint.fingerprint["code"]} - {""}) > 1
                 for name, checkpoint in checkpoints.items())
    return [*caveats, *["trained by other code"] * edited]


def encoder_of(checkpoints):
    """The key of the text encoder that models were trained from; "" if none was."""
    return max(checkpoint.fingerprint.get("encoder", "") for checkpoint in checkpoints.values())


# %% 16. Calibration and prediction: the one way from clips to probabilities
def log_probs_of(checkpoints, splits=SPLITS):
    """(windows, log-probabilities of each system, labels of the clips) of some splits."""
    # All checkpoints of a run hold log-probabilities of the same windows in the same order.
    first = next(iter(checkpoints.values()))
    windows = pd.DataFrame(first.windows).query("split in @splits")
    log_probs = {name: checkpoint.log_probs[:, windows.index.to_list()]
                 for name, checkpoint in checkpoints.items()}
    return windows, log_probs, labels_of(windows["emotion"][~windows["clip"].duplicated()], first.classes)


def calibrate(checkpoints, cfg):
    """What validation decides, by system: the temperature of a model, the weights of a learned fusion."""
    windows, log_probs, labels = log_probs_of(checkpoints, ["validation"])
    each = labels_of(windows["emotion"], next(iter(checkpoints.values())).classes)  # that of its clip
    calibration = {name: fit_temperature(mean_of_views(log_probs[name], cfg), each) for name in log_probs}

    answers = predict(log_probs, windows, calibration, cfg)
    for name, system in SYSTEMS.items():
        if system.kind is weighted and set(system.parts) <= set(answers):
            logs = np.log(np.stack([answers[part] for part in system.parts]).clip(1e-7))
            calibration[name] = fit_fusion_weights(logs, labels).tolist()
    return calibration


def predict(log_probs, windows, calibration, cfg):
    """What each system answers for each clip: probabilities (N, C), clips in the order of `windows`.

    `log_probs` maps models to log-probabilities (V, W, C) of windows. Views are averaged as
    log-probabilities, then comes the model's temperature, then windows are averaged by the voice in them;
    late fusions are made of these answers. A system whose parts are missing is missing.
    """
    answers = {}
    for name, system in SYSTEMS.items():
        decided = name in calibration or system.kind is mean_of
        if name in log_probs:
            logits = mean_of_views(log_probs[name], cfg) / calibration[name]
            answers[name] = pool_windows(logits.softmax(dim=1).numpy(), windows)
        elif name not in TRAINED and decided and set(system.parts) <= set(answers):
            parts = np.stack([answers[part] for part in system.parts])  # (P, N, C)
            answers[name] = system.kind(parts, calibration.get(name))
    return answers


def mean_of_views(log_probs, cfg):
    """The mean (W, C) of the first TEST_VIEWS views of log-probabilities (V, W, C)."""
    return log_probs[:cfg.test_views].mean(dim=0)


def pool_windows(probabilities, windows):
    """Probabilities (W, C) of windows averaged by clip, weighted by the voice in them: (N, C)."""
    voiced = windows["voiced"].to_numpy()[:, None] + 1e-9  # a clip without any voice has an answer too
    sums = pd.DataFrame(np.hstack([probabilities * voiced, voiced]))
    sums = sums.groupby(windows["clip"].to_numpy(), sort=False).sum().to_numpy()  # (N, C + 1)
    return sums[:, :-1] / sums[:, -1:]


def fit_temperature(logits, labels):
    """The temperature that minimises the NLL of softmax(logits / temperature) (Guo et al. 2017)."""
    # A grid is as good as a search here, and the same on every machine.
    grid = np.geomspace(0.5, 12, 300).tolist()  # a validation split without a mistake would ask for 0
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    return min(grid, key=lambda temperature: float(F.cross_entropy(logits / temperature, labels)))


def fit_threshold(probabilities, labels):
    """The confidence below which an answer is "unsure": what is above it is most often right, net of wrong.

    So where confidences are calibrated, it is near one half.
    """
    right = pd.Series(probabilities.argmax(axis=1) == labels)
    # Who are as confident are above it together.
    net = (2 * right - 1).groupby(probabilities.max(axis=1)).sum()[::-1].cumsum()
    return float(net.idxmax()) if net.max() > 0 else math.inf


def fit_fusion_weights(logs, labels):
    """Non-negative weights (P,) of log-probabilities (P, N, C) with the least class-balanced NLL.

    A penalty draws them to 1 / P, the geometric mean: two validation actors leave much open. Its strength
    was chosen where weights of one validation actor are scored on the other.
    """
    from scipy.optimize import minimize
    # Every emotion weighs the same, as in UAR.
    share, even = 1 / np.bincount(labels)[labels], 1 / len(logs)

    def loss(weights):
        """What is minimised."""
        joined = log_softmax(np.tensordot(weights, logs, 1), axis=1)
        nll = -np.average(joined[np.arange(len(labels)), labels], weights=share)
        return nll + 0.05 * ((weights - even) ** 2).sum()

    return minimize(loss, np.full(len(logs), even), bounds=[(0, None)] * len(logs)).x


def labels_of(emotions, classes):
    """The label indices (N,) of a column of emotions."""
    return np.array(list(map(classes.index, emotions)), int)


TRAITS = ["split", "clip", "actor", "emotion", "intensity", "statement", "sex", "transcript"]  # if known


def predictions_table(answers, clips, classes, **run):
    """A row per system and clip: what was answered, beside what the clip is like and columns of `run`."""
    traits = clips.filter(TRAITS).reset_index(drop=True)
    tables = []
    for name, probabilities in answers.items():
        columns = pd.DataFrame(probabilities, columns=classes)
        tables.append(traits.assign(system=name, **run, predicted=columns.idxmax(axis=1)).join(columns))
    return pd.concat(tables, ignore_index=True)


def with_ensembles(table, classes):
    """The predictions of all runs, and of an ensemble of the seeds of each fold, calibrated on validation."""
    tables = [table]
    for name in (name for name, system in SYSTEMS.items() if system.kind is ensemble):
        for fold, seeds in table[table["system"].isin(SYSTEMS[name].parts)].groupby("fold"):
            if seeds["seed"].nunique() == 1:
                continue
            clips = seeds.drop_duplicates("clip")
            logs = np.log(seeds[classes].clip(1e-7)).groupby(seeds["clip"], sort=False).mean().to_numpy()
            held_out = (clips["split"] == "validation").to_numpy()
            temperature = fit_temperature(logs[held_out], labels_of(clips["emotion"], classes)[held_out])
            tables.append(predictions_table({name: ensemble(logs, temperature)}, clips, classes, fold=fold,
                                            seed=seeds["seed"].min()))
    return pd.concat(tables, ignore_index=True)


# %% 17. Figures: all of them are groups of the one long table of predictions
@dataclass(frozen=True, eq=False)  # so that figures can be kept for it
class Results:
    """All that tables, plots and report are made of: what a run writes, and --phase report reads back.

    `predictions` has a row per system, fold, seed and clip: split, clip, actor, emotion, predicted, a
    probability per emotion, and what the corpus knows of the clip (intensity, sex, transcript). `histories`
    has a row per system, fold, seed and epoch. `config` holds command, settings, versions, caveats, audit,
    classes, titles of the systems, temperatures and fusion weights by run, and why systems did not run.
    """

    folder: Path
    config: dict
    predictions: pd.DataFrame
    histories: pd.DataFrame

    @property
    def classes(self):
        """The emotions in the order of their labels."""
        return self.config["classes"]

    @property
    def titles(self):
        """What the systems are called on every page, by name."""
        return self.config["titles"]

    @property
    def test(self):
        """The predictions of the test split."""
        return self.predictions.query("split == 'test'")

    @property
    def by_system(self):
        """The pairs of a system and its predictions of the test split."""
        return self.test.groupby("system", sort=False)


RESULT_KEYS = set("corpus subject date command settings versions caveats classes titles oracles "
                  "unseen_actors not_run calibration encoder audit tables".split())


def save_results(folder, config, **tables):
    """Write what read_results reads, config.json last: without it a folder counts as unfinished."""
    path = Path(folder, "config.json")
    path.unlink(missing_ok=True)
    for name, table in tables.items():
        file = path.with_name(f"{name}.csv")
        save_table(file, table, config["caveats"])
        tables[name] = digest(file.read_bytes())
    save(path, config | {"tables": tables})


def read_results(folder):
    """The Results in a folder. Raises UserError when they are missing, unfinished or foreign."""
    path, tables = Path(folder, "config.json"), {}
    config = read_back(path)
    refuse({f"{path} is foreign: make it again with --phase all, or name another --output-dir":
            not (isinstance(config, dict) and set(config) >= RESULT_KEYS
                 and set(config["settings"]) >= set(Settings._fields))})
    for name, key in config["tables"].items():
        file = path.with_name(f"{name}.csv")
        content = read_back(file, Path.read_bytes)
        refuse({f"{file} is not the one that {path} was written with: make it again with --phase all":
                digest(content) != key})
        texts = dict.fromkeys([*TRAITS, "predicted"], str)
        tables[name] = pd.read_csv(io.BytesIO(content), keep_default_na=False, dtype=texts)
    tables["predictions"]["actor"] = numbers_if_plain(tables["predictions"]["actor"])
    return Results(path.parent, config, **tables)


GROUPS = "", "fold seed", "actor", "sex", "intensity", "statement", "emotion"


@functools.lru_cache(maxsize=16)
def figures_of(results, *by):
    """The figures of every system and split, or of the groups that the columns `by` make: a row each."""
    return score(results.predictions, results.classes, ["system", "split", *by])


def test_uar(results, *by):
    """The UAR on the test split of every system, or of groups as in `figures_of`: a Series."""
    return figures_of(results, *by)["uar"].xs("test", level="split")


def score(table, classes, by):
    """Clips, accuracy, UAR, macro-F1, NLL and ECE of predictions: a row for each group that columns make."""
    # Six decimals in a CSV do not add up to one.
    probabilities = table[classes].to_numpy().clip(1e-7, 1)
    answered = probabilities[np.arange(len(table)), labels_of(table["emotion"], classes)]
    rows = table[by].assign(
        true=table["emotion"],
        found=table["predicted"],
        right=table["emotion"] == table["predicted"],
        nll=np.log(probabilities.sum(axis=1) / answered))
    groups, emotions = rows.groupby(by, sort=False), rows.groupby([*by, "true"], sort=False)["right"]

    # Of each emotion that occurs, as true or as predicted.
    named = rows.melt(by, ["true", "found"]).groupby([*by, "value"], sort=False).size()
    f1 = 2 * emotions.sum().reindex(named.index, fill_value=0) / named

    return pd.DataFrame({
        "clips": groups.size(),
        "accuracy": groups["right"].mean(),
        "uar": emotions.mean().groupby(by, sort=False).mean(),
        "macro_f1": f1.groupby(by, sort=False).mean(),
        "nll": groups["nll"].mean(),
        **calibration_errors(table, classes, by),
    }, groups.size().index)


def calibration_errors(table, classes, by):
    """ECE of groups of predictions, and what it would be by chance if every confidence were right."""
    bins = reliability(table, classes, by)
    confidence, clips = bins["confidence"], bins["clips"]
    # How many answers are right is binomial then.
    deviation = np.sqrt(2 / math.pi * confidence * (1 - confidence) / clips)
    gaps = pd.DataFrame({"ece": abs(confidence - bins["right"]), "ece_if_perfect": deviation})
    share = clips / clips.groupby(by).transform("sum")
    return gaps.mul(share, axis="index").groupby(by, sort=False).sum()


def confusion(table, classes):
    """How often each emotion (rows) was taken for each (columns) in predictions: a table of counts."""
    counts = pd.crosstab(table["emotion"], table["predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0)


def reliability(table, classes, by):
    """Mean confidence, share right and clips in 15 equal bins of confidence: a row for each group and bin."""
    confidence = table[classes].max(axis=1)
    answers = table[by].assign(
        # A confidence of exactly 1 belongs to the last bin.
        bin=(confidence * 15).astype(int).clip(upper=14),
        confidence=confidence,
        right=table["emotion"] == table["predicted"])
    groups = answers.groupby([*by, "bin"], sort=False)
    return groups.mean().assign(clips=groups.size())


def unseen_actors(clips):
    """The actors that are validation in no fold, so that no choice has heard them."""
    chosen_on = [validation for validation, _ in fold_actors(clips)]
    return sorted(set(clips["actor"]).difference(*chosen_on))


def voices_of(table):
    """What a bootstrap draws, for each row of a table: its actor, its clip where no actor is named."""
    return table["actor"].replace("", np.nan).fillna(table["clip"])


def resampled(clusters, names, draws=2000):
    """How often each row counts when whole clusters (N,) are drawn with replacement: (draws, N).

    Tables with the same cluster `names` share their draws.
    """
    # The generator is the same each time: systems that share names are compared draw by draw.
    names = np.unique(names)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    return counts[:, np.searchsorted(names, clusters)].astype(np.float32)


def weighted_uar(weights, table, classes):
    """The UAR of predictions (N rows) under each row of weights (draws, N): (draws,)."""
    true = np.eye(len(classes), dtype=np.float32)[labels_of(table["emotion"], classes)]  # (N, C)
    right = true * (table["predicted"] == table["emotion"]).to_numpy()[:, None]
    with np.errstate(invalid="ignore"):  # emotions that were not drawn
        return np.nanmean((weights @ right) / (weights @ true), axis=1)


@functools.lru_cache(maxsize=16)
def bootstrap(results):
    """The test UAR of every system (columns) in 2000 bootstrap draws (rows).

    Voices are drawn with replacement, and sentences too where they are simulated, the same for all systems:
    the difference of two columns is a paired bootstrap.
    """
    uars = {}
    for system, part in results.by_system:
        voices = voices_of(part)
        weights = resampled(voices, voices)
        if system in results.config["oracles"]:
            weights = weights * resampled(part["transcript"], results.predictions["transcript"])
        uars[system] = weighted_uar(weights, part, results.classes)
    return pd.DataFrame(uars)


@functools.lru_cache(maxsize=16)
def summarize(results):
    """A row per system of the figures that a reader compares, UAR with its interval; index: system."""
    figures = figures_of(results)
    train, validation, test = (figures.query("split == @split").droplevel("split") for split in SPLITS)
    # The headline is the mean of the runs, the interval that of the pooled predictions.
    by_run = test_uar(results, "fold", "seed")
    unseen = results.test[results.test["actor"].isin(results.config["unseen_actors"])]
    draws = bootstrap(results)
    summary = pd.DataFrame({
        "train_accuracy": train["accuracy"],
        "validation_uar": validation["uar"],
        "validation_nll": validation["nll"],
        "uar": by_run.groupby("system").mean(),
        "low": draws.quantile(0.025),
        "high": draws.quantile(0.975),
        "sd_folds": by_run.groupby(["system", "fold"]).mean().groupby("system").std(),
        "sd_seeds": by_run.groupby(["system", "seed"]).mean().groupby("system").std(),
        "unseen": score(unseen, results.classes, ["system"])["uar"],
    })
    return summary.join(test.drop(columns=["clips", "uar"])).loc[list(draws)]


def percent(share):
    """A share as all pages write it: 65.5 %."""
    return f"{100 * share:.1f} %"


HEADINGS = {  # of the closing table
    "uar": "test UAR",
    "interval": "95 % interval",
    "sd_folds": "SD folds",
    "sd_seeds": "SD seeds",
    "unseen": "unseen actors",
    "accuracy": "acc",
    "macro_f1": "macro-F1",
    "train_accuracy": "train acc",
    "validation_uar": "val UAR",
    "validation_nll": "val NLL",
    "nll": "NLL",
    "ece": "ECE",
    "ece_if_perfect": "if perfect",
}


def table_of(results):
    """The closing table of console, report and LaTeX: texts by system; `note` says why one did not run."""
    summary = summarize(results)
    texts = summary.map(percent, na_action="ignore")
    texts["interval"] = texts["low"] + " to " + texts["high"]
    texts.update(summary.filter(regex="nll|ece").map("{:.3f}".format, na_action="ignore"))
    table = pd.DataFrame({"system": results.titles}).join(texts.filter(HEADINGS).rename(columns=HEADINGS))
    table["note"] = {name: f"not run: {why}" for name, why in results.config["not_run"].items()}
    return table.dropna(axis="columns", how="all").fillna("-")


def plural(n, noun):
    """A number of things: 1 clip, 2 clips."""
    return f"{n} {noun}" + "s" * (n != 1)


# %% 18. Files
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
            temporary.unlink()


def save(path, content):
    """Write bytes, a DataFrame (as CSV, six decimals) or builtin containers (as JSON)."""
    with replacing(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        elif isinstance(content, pd.DataFrame):
            content.to_csv(temporary, index=False, float_format="%.6f")
        else:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def save_table(path, table, caveats):
    """Write a DataFrame as CSV, with the caveats of its run in every row."""
    save(path, table.assign(caveats="; ".join(caveats)))


def read_back(path, read=lambda path: json.loads(path.read_text(encoding="utf-8"))):
    """read(path), by default as JSON; a UserError says how to make a file that is missing or broken."""
    try:
        return read(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or not readable ({error}): delete it and make it again with "
                        "--phase all, or name the --output-dir of a finished run") from error


def saved_in(folder, key, default, file="config.json"):
    """What a JSON file in a folder holds under a key; the default when there is nothing to be read."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        return read_back(Path(folder, file))[key]
    return default


def digest(*parts):
    """A short hexadecimal key of bytes and JSON-ready values."""
    sha = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        if not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        sha.update(part)
    return sha.hexdigest()[:16]


def in_kernel():
    """Whether this runs in a notebook kernel."""
    return "ipykernel" in sys.modules and sys.modules["IPython"].get_ipython() is not None


@contextlib.contextmanager
def single_precision():
    """What is made in here is float32, whatever a notebook has set as torch's default."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def only_warning(but=False):
    """Say what went wrong and go on, since an answer can still be given; `but` raise it after all."""
    try:
        yield
    except UserError as error:
        if but:
            raise
        print(f"warning: {error}", file=sys.stderr)


def versions(device):
    """What a result depends on: the hardware that computed it, and versions."""
    hardware = f"{device} in {training_precision(device)}, {plural(torch.get_num_threads(), 'thread')}"
    return {"hardware": hardware, "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            **{module.__name__: str(module.__version__) for module in (torch, np, pd)}}


def command_of(cfg):
    """The command line that repeats a run."""
    flags = [flag_of(key, getattr(cfg, key)) for key in cfg.given]
    return shlex.join(["python", "emotion_recognition.py", *flags])


def pick_device(cfg):
    """The torch device type of --device: cuda, mps or cpu. Raises UserError when it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = cfg.device.replace("auto", there[0])
    refuse({f"--device {device} is not available here: leave it out or use --device cpu":
            device not in there})
    return device


# The official archive: all 1440 clips in folders Actor_01 to Actor_24.
ARCHIVE = {
    "url": "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip",
    "megabytes": 208,
    "md5": "bc696df654c87fed845eb13823edef8a"}


def download_corpus(cfg):
    """Put the clips of ARCHIVE into --ravdess-path, all or none, unless clips are found. Raises UserError."""
    import pooch
    import requests
    # A corpus that is there is never fetched again.
    with contextlib.suppress(UserError):
        print(f"Nothing to download: RAVDESS clips are in {find_corpus(cfg)}")
        return
    folder = Path(cfg.ravdess_path)
    part = Path(f"{folder}{UNFINISHED}")
    print(f"RAVDESS: {ARCHIVE['megabytes']} MB from {ARCHIVE['url']}\nLicence CC BY-NC-SA 4.0, not for "
          "commercial use; cite Livingstone & Russo (2018), PLoS ONE 13(5): e0196391", flush=True)
    headers = {"User-Agent": "emotion_recognition.py"}  # Zenodo refuses the name that requests gives itself
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.rmdir()  # if it is not empty, an OSError keeps what is in it
        shutil.rmtree(part, ignore_errors=True)
        pooch.get_logger().setLevel("WARNING")
        pooch.retrieve(ARCHIVE["url"], f"md5:{ARCHIVE['md5']}", "archive.zip", part.absolute(),
                       downloader=pooch.HTTPDownloader(progressbar=True, headers=headers),
                       processor=pooch.Unzip(extract_dir="clips"))
        (part / "clips").rename(folder)
    except (requests.RequestException, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{ARCHIVE['url']} cannot be fetched, or arrived damaged ({error}): try again later, "
                        "or get the corpus another way and name its folder with --ravdess-path") from error
    except OSError as error:
        raise UserError(f"{folder} cannot take the corpus ({error}): make room, or name a new folder "
                        "elsewhere with --ravdess-path") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # with the zip


# %% 19. Plots
FONTS = (  # with letters that matplotlib's own font lacks; those that are installed are used
    "Noto Sans CJK SC,Noto Sans CJK JP,Source Han Sans SC,WenQuanYi Zen Hei,Microsoft YaHei,SimHei,"
    "PingFang SC,Hiragino Sans,Yu Gothic,Malgun Gothic,Apple SD Gothic Neo,Noto Sans Thai,Leelawadee UI,"
    "Tahoma,Noto Sans Devanagari,Nirmala UI,Noto Sans Arabic,Arial Unicode MS,Arial")


def save_figure(figure, path, caveats, title="", words=True):
    """Save a figure with its title and caveats above, show it in a notebook, close it.

    Caveats about texts are left out unless there are `words` in it.
    """
    caveats = [caveat for caveat in caveats if words or "text: " not in caveat]
    figure.set_layout_engine("constrained")  # close to its title
    figure.suptitle("\n".join([title, *caveats]), y=1, va="bottom", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    if in_kernel():
        from IPython.display import Image, display
        display(Image(filename=str(path)))
    plt.close(figure)


def save_plot(figure, results, name, title, words=True):
    """Save a plot of results under its name; its title ends with what the figures are of."""
    save_figure(figure, results.folder / f"plots/{name}.png", results.config["caveats"],
                f"{title}\n{results.config['subject']}", words)


def legend_beside(axis, **options):
    """A legend to the right of a plot, where it hides nothing."""
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), **options)


def plot_counts(clips, subject, folder, caveats):
    """Clips per emotion in each split."""
    import seaborn as sns
    # Bars lie, so that long names are readable, however many there are.
    figure = plt.figure(figsize=(7, 5))
    sns.countplot(clips, y="emotion", hue="split", hue_order=SPLITS)
    legend_beside(plt)
    save_figure(figure, folder / "plots/class_counts.png", caveats, f"{subject}, {len(clips)} clips",
                words=False)


def plot_samples(clips, subject, cfg, caveats):
    """The log-mel spectrogram of one training clip per emotion, as AudioCNN hears it."""
    samples = clips.query("split == 'train'").sort_values(["emotion", "actor", "clip"])
    samples = samples.drop_duplicates("emotion")
    windows = ClipDataset(samples, AudioCNN, cfg, "cpu").windows(range(len(samples)))  # (N, 1, M, T)
    decibels = np.hstack(windows.squeeze(1).numpy()) * 10 / math.log(10)  # (M, N * T)
    # Mel bands are evenly spaced in log(1 + kHz / 0.7).
    low, high = np.log1p([0.05 / 0.7, cfg.sampling_rate / 1400])
    figure = plt.figure(figsize=(8.5, 4.5), layout="constrained")
    plt.imshow(decibels, aspect="auto", origin="lower", extent=(0, len(samples), low, high))
    plt.colorbar(label="dB")
    plt.gca().yaxis.set_major_formatter(lambda mel, _: f"{0.7 * math.expm1(mel):.1f} kHz")
    names = samples["emotion"].astype(str) + "\n" + samples["clip"]
    plt.xticks(np.arange(len(samples)) + 0.5, names, rotation=45, fontsize=7)
    save_figure(figure, Path(cfg.output_dir, "plots/samples.png"), caveats, f"{subject}, training clips",
                words=False)


def plot_curves(results):
    """Loss and accuracy by epoch of every model that was trained, the mean of all runs."""
    import seaborn as sns
    kinds = ["train_loss", "validation_loss", "train_accuracy", "validation_accuracy"]
    curves = results.histories.replace(results.titles)
    curves[kinds[2:]] *= 100
    # One row per split and kind of curve, as seaborn wants it.
    curves = curves.melt(["system", "epoch"], kinds)
    curves[["split", "kind"]] = curves["variable"].str.split("_", expand=True)
    grid = sns.relplot(curves, x="epoch", y="value", row="system", col="kind", hue="split", kind="line",
                       errorbar=None, marker="o", markersize=4, height=1.3, aspect=2.3,
                       facet_kws={"sharey": "col", "sharex": False})
    grid.set_titles("{row_name}: {col_name}", size=8)
    sns.move_legend(grid, "outside right")
    grid.map(lambda **_: plt.locator_params(axis="x", integer=True, min_n_ticks=1))  # whole epochs
    save_plot(grid.figure, results, "training_curves", "Training, mean of all runs, accuracy in %")


def plot_comparison(results):
    """The test UAR of all systems with its interval, and that of chance."""
    summary = 100 * summarize(results)
    # What sentences drawn by label are worth is another question than what can be heard.
    colors = ["wheat" if reads_words(name) else "steelblue" for name in summary.index]
    summary = summary.rename(results.titles)
    ends = [summary["uar"] - summary["low"], summary["high"] - summary["uar"]]
    axis = summary["uar"].plot.barh(xerr=np.clip(ends, 0, 100), color=colors, label="UAR, 95 % interval",
                                    figsize=(9.5, 1.2 + 0.3 * len(summary)))
    axis.axvline(100 / len(results.classes), color="firebrick", label="chance")
    axis.invert_yaxis()
    legend_beside(axis)
    save_plot(axis.figure, results, "comparison", "Test UAR in % with 95 % interval: sound alone is blue")


def plot_reliability(results):
    """How often each system is right on test clips, by its confidence; ideally on the diagonal."""
    import seaborn as sns
    # Fewer clips say nothing of how often a system is right.
    lines = reliability(results.test, results.classes, ["system"]).query("clips >= 5").reset_index()
    if lines.empty:
        return
    lines[["confidence in %", "right in %"]] = 100 * lines[["confidence", "right"]]
    grid = sns.relplot(lines.replace(results.titles), x="confidence in %", y="right in %", col="system",
                       col_wrap=4, height=2.2, kind="line", marker="o")
    grid.set_titles("{col_name}", size=7)
    grid.map(lambda **_: plt.axline((0, 0), slope=1, color="firebrick"))
    save_plot(grid.figure, results, "reliability", "Right answers by confidence, bins of five clips and more")


def plot_coverage(results):
    """The test UAR of the answers that are left when the least confident ones are withheld."""
    uars, confidence = {}, results.test[results.classes].max(axis=1).groupby(results.test["system"])
    before = (confidence.rank(method="min", ascending=False) - 1) / confidence.transform("size")
    for share in np.linspace(0.1, 1, 19):
        uars[100 * share] = score(results.test[before < share], results.classes, ["system"])["uar"]
    lines = 100 * pd.DataFrame(uars).T.rename(columns=results.titles)
    axis = lines.plot(figsize=(8, 4), xlabel="answered in %", ylabel="UAR in %")
    legend_beside(axis, fontsize=7)
    save_plot(axis.figure, results, "coverage", "UAR of the most confident answers")


def plot_confusions(results):
    """The test confusion matrix of each system, in % of the true emotion, with counts: a file each."""
    import seaborn as sns
    table = table_of(results)
    for name, part in results.by_system:
        counts = confusion(part, results.classes)
        shares = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        texts = shares.map("{:.0f} %\n".format) + counts.map("({})".format)
        figure = plt.figure(figsize=(9, 4.2))
        axis = sns.heatmap(shares, annot=texts, fmt="", cbar=False, cmap="Blues", annot_kws={"fontsize": 8})
        axis.set(xlabel="predicted", ylabel="true")
        plt.yticks(rotation=0)
        title = "{system}: test UAR {test UAR}, 95 % interval {95 % interval}".format_map(table.loc[name])
        save_plot(figure, results, f"confusion_{SYSTEMS[name].file}", title, reads_words(name))


def uar_by(results, by):
    """Test UAR of every system (rows) in the groups of a column, as texts; of `emotion` its recall."""
    order = results.test["system"].unique(), results.test[by].unique()
    return test_uar(results, by).unstack(by).loc[order].map(percent).rename(results.titles)


def shares_table(results):
    """How often each system names each emotion on test clips, and how often it is true, as texts."""
    shares = {}
    for name, part in results.by_system:
        shares[results.titles[name]] = part["predicted"].value_counts(normalize=True)
    shares["true"] = part["emotion"].value_counts(normalize=True)  # all systems answer the same clips
    return pd.DataFrame(shares, results.classes).fillna(0).T.map(percent).rename_axis("system")


def draw_plots(results):
    """Draw all plots of results into plots/, after removing those of earlier results."""
    # A plot of earlier figures beside these would pass for one of theirs.
    for old in results.folder.glob("plots/*.png"):
        if old.stem not in ("class_counts", "samples"):  # which are of the data
            old.unlink()
    plot_comparison(results)
    plot_reliability(results)
    plot_coverage(results)
    plot_confusions(results)
    if len(results.histories):
        plot_curves(results)


# %% 20. Report
REPORT = "emotion_recognition_report.docx"
FIT = "train acc,val UAR,val NLL,NLL,ECE,if perfect".split(",")  # these make a table of their own
# The report, paragraph by paragraph. `name | text` stands where parts_of has something of that name: a table
# or a plot under its caption, else the sentence. What is not in this form is a heading.
PAGES = """
corpus | {date}: {subject}.

corpus | {command}

Results

results | Test split of {subject}.

caveats | Mind: {caveats}.

comparison | UAR of all systems, those that only hear in blue.

fit | Training, validation and calibration.

corpus | The 95 % interval says how far the UAR moves with the speakers who happen to be tested: they are
drawn with replacement from the pooled test predictions, 2000 times. Few speakers make it rough. SD is the
standard deviation over folds or seeds.

oracles | For systems that read simulated sentences, these are drawn too. They come from a bank by label:
such systems show how text and fusion work, not how well words tell feelings.

corpus | UAR is the mean of the recalls of the emotions that occur; guessing gives one by their number. ECE
is the mean distance of confidence and accuracy; beside it stands what it would be by chance if every
confidence were right.

corpus | Nobody who speaks in the test split was heard in training, unless this report says that speakers
are shared. The test split is scored by the final models and decides nothing; what validation decides
flatters validation a little.

unseen_actors | One fold tests a fifth of the actors, and figures move by ten points and more from one set
of actors to the next: compare systems over all five folds, never on one. Unseen actors are validation in no
fold, so that no choice has heard them: {unseen_actors}.

corpus | Nothing here measures what a person feels, and nothing here is fit for judging people.

Data and split

corpus | {audit}

class_counts | Clips of each emotion in the splits.

samples | Log-mel spectrograms, {clip_seconds} s of each clip, as AudioCNN hears them.

ravdess | RAVDESS holds acted speech of 24 North American speakers. Livingstone S. R., Russo F. A. (2018),
The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS), PLoS ONE 13(5): e0196391, licence
CC BY-NC-SA 4.0.

manifest | Corpus: the clips of {manifest}.

Method

corpus | Features: log-mel spectrograms of {n_mels} bands from 50 Hz to half of {sampling_rate} Hz; FFT
windows of {n_fft} samples, {hop_length} samples apart. What lies {trim_db} dB below the loudest speech nearby
is cut off at both ends, pauses to a quarter second, and {clip_seconds} s in the middle are heard.

speech | SpeechEncoder: logistic regression (C = {speech_c}) on the time means of all layers of a frozen
encoder, {speech_encoder} ({whisper_model}), standardised; clips at three speeds, in noise and through a
telephone.

words | Words: sentences are cut after {max_tokens} words or word pieces, and a share of {word_dropout} is
hidden in training.

encoder | Text encoder of the BERT systems: {bert_model}.

corpus | Training: AdamW (weight decay {weight_decay}) with a one-cycle learning rate, batches of
{batch_size} clips, dropout {dropout}, label smoothing {label_smoothing}; sound in other voices, tempos and
colours, in noise, without upper bands, mixed up ({mixup}). The moving average of the weights ({ema_decay} a
step) after the last epoch is the model; no epoch is picked.

corpus | Split: {subject}. Validation decides temperatures, and the weights of learned fusions. Hardware:
{versions[hardware]}.

networks | Trained parameters (early fusion trains a head on frozen networks), epochs, and seconds of
training in all runs; what validation decided in the first: temperatures, or weights of sound and words.

training_curves | Loss and accuracy of every network.

reliability | How often systems are right, by their confidence; on the straight line as often as they say.

coverage | UAR of the answers that are left when the least confident ones are withheld.

shares | How often each emotion is named, and how often it is true.

Details

by_sex | Test UAR by sex.

by_intensity | Test UAR by intensity.

by_emotion | Recall of each emotion.

by_actor | Test UAR by speaker, of the system that stands first.

pairs | Paired differences in pooled UAR, in points, with the ends of their 95 % intervals.

confusion_Audio* | Test clips in % of their true emotion, and how many.

confusion_Speech* | Test clips in % of their true emotion, and how many.

confusion_Text* | Test clips in % of their true emotion, and how many.

confusion_*Fusion* | Test clips in % of their true emotion, and how many.

Settings and versions

shaping | Settings that shaped these figures.

used | Versions.
"""


def printable(text):
    """A text with a question mark for every character that XML does not admit."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def differences_table(results):
    """Pooled test UAR of each system minus that of each other, with the 95 % interval, as texts in points.

    The interval is that of the paired bootstrap.
    """
    draws, uar, titles = 100 * bootstrap(results), 100 * test_uar(results), results.titles
    rows = []
    for first, second in itertools.combinations(draws, 2):
        interval = (draws[first] - draws[second]).quantile([0.025, 0.975])
        points = map("{:+.1f}".format, [uar[first] - uar[second], *interval])
        rows.append((titles[first], titles[second], *points))
    return pd.DataFrame(rows, columns="system against difference low high".split())


def networks_table(results):
    """A line per network: parameters, epochs and seconds of its training, and what validation decided."""
    decided = next(iter(results.config["calibration"].values()))
    table = results.histories.groupby("system").agg({"parameters": "first", "epoch": "max", "seconds": "sum"})
    table = table.round().reindex([*decided]).convert_dtypes().astype(object).fillna("-")
    table["decided"] = [str(np.round(value, 2)) for value in decided.values()]
    return table.rename(results.titles).reset_index()


def parts_of(results):
    """What PAGES can name: settings, what config.json holds, plots, tables, and what holds or does not."""
    config, table = results.config, table_of(results)
    plots = {path.stem: path for path in sorted(results.folder.glob("plots/*.png"))}
    settings = pd.Series(config["settings"]).drop(FREE, errors="ignore")
    return config["settings"] | config | plots | {
        "audit": "\n".join(config["audit"]),
        "caveats": "; ".join(config["caveats"]),
        "words": any(map(reads_words, bootstrap(results))),
        "speech": "speech" in bootstrap(results),
        "ravdess": not config["settings"]["manifest"],
        "results": table.drop(columns=FIT, errors="ignore"),
        "fit": table.filter(["system", *FIT]),
        "networks": len(results.histories) and networks_table(results),
        "unseen_actors": ", ".join(map(str, config["unseen_actors"])),
        "by_actor": "" not in set(results.test["actor"]) and uar_by(results, "actor")[:1].T.reset_index(),
        **{f"by_{by}": uar_by(results, by).reset_index()
           for by in ("sex", "intensity", "emotion") if by in results.test},
        "shares": shares_table(results).reset_index(),
        "pairs": len(config["calibration"]) > 1 and differences_table(results),
        "shaping": settings[settings != ""].reset_index().set_axis(["setting", "value"], axis=1),
        "used": pd.DataFrame(config["versions"].items(), columns=["what", "version"]),
    }


def load_docx():
    """The package that writes .docx, or a UserError that says how to have the report after all."""
    return load_package("docx", "pip install python-docx, then --phase report makes it", "Document")


def write_report(results):
    """Write the report as .docx on A4, with the caveats of its run and a number on every page."""
    docx = load_docx()
    from docx.shared import Cm
    document, parts = docx.Document(), parts_of(results)
    page = document.sections[0]
    page.page_width, page.page_height, page.left_margin, page.right_margin = map(Cm, (21, 29.7, 2, 2))
    page.header.paragraphs[0].text = printable(parts["caveats"])
    page.footer.paragraphs[0]._p.append(word_element('fldSimple w:instr="PAGE"'))
    document.styles["Normal"].font.size = Cm(0.32)
    document.styles["Caption"].paragraph_format.keep_with_next = True
    document.add_heading("Speech emotion recognition", 0)

    for paragraph in PAGES.strip().split("\n\n"):
        pattern, _, text = " ".join(paragraph.split()).partition(" | ")
        if not text:
            document.add_heading(pattern, 1)
        for name in fnmatch.filter(parts, pattern):
            add_part(document, parts[name], printable(text.format_map(parts)))
    with replacing(results.folder / REPORT) as temporary:
        document.save(temporary)


def add_part(document, part, text):
    """Append a table or a picture to a docx document under a numbered caption, else the text if it holds."""
    from docx.shared import Cm
    if isinstance(part, pd.DataFrame):
        if len(part):
            document.add_paragraph(f"Table {len(document.tables) + 1}. {text}", "Caption")
            add_table(document, part)
    elif isinstance(part, Path):
        document.add_paragraph(f"Figure {len(document.inline_shapes) + 1}. {text}", "Caption")
        document.add_picture(str(part), Cm(17))
    elif part:
        document.add_paragraph(text, "List Bullet")


def add_table(document, table):
    """Append a DataFrame to a docx document; no row breaks, and the header is repeated on every page."""
    from docx.shared import Cm
    columns = [[name, *table[name].astype(str)] for name in table]
    widths = [7 + min(24, max(map(len, texts))) for texts in columns]
    grid = document.add_table(1 + len(table), len(columns), "Light Shading Accent 1")
    # Word goes by the widths of cells, others by those of columns.
    for column, width, texts in zip(grid.columns, widths, columns):
        column.width = Cm(17 * width / sum(widths))
        for text, cell in zip(texts, column.cells):
            cell.text, cell.width = printable(text), column.width
    for row in grid.rows:
        row._tr.get_or_add_trPr().append(word_element("cantSplit"))
    grid.rows[0]._tr.trPr.append(word_element("tblHeader"))
    document.add_paragraph()  # tables that touch become one


def word_element(tag):
    """An element of Word's own language, which python-docx has no name for."""
    from docx.oxml import ns, parse_xml
    return parse_xml(f"<w:{tag} {ns.nsdecls('w')}/>")


# %% 21. Prediction on one's own recordings
NO_SPEECH = "no speech"
RECORDINGS = {*AUDIO_SUFFIXES, *".m4a .aac .opus .aif .aiff .au .caf .wma .webm .mp4 .oga .w64 .amr .3gp"
              .split()}
# Settings that shape no training.
FREE = "phase output_dir device download input ask_systems text json reuse_edited given".split()
# Those of a Predictor, and all that --phase predict has a use for.
OF_PREDICTOR = "whisper_model", "whisper_language", "speech_encoder", "ask_systems", "channel", "test_views"
PREDICTS_WITH = {*OF_PREDICTOR, *"phase output_dir device input text json demo".split()}


def checkpoints_together(cfg):
    """The Checkpoints of OUTPUT_DIR by system, but for those that were not trained beside the first one.

    Each one passed over is named once, since the others can answer. Raises UserError when none can.
    """
    # The first one decides who belongs together: same seed, same clips, same parts.
    found = {}
    for name in (name for name in TRAINED if file_of(cfg, name).exists()):
        with only_warning(not found):
            checkpoint = read_checkpoint(cfg, name)
            first = next(iter(found.values()), checkpoint)
            parts = {part: digest(found[part].fingerprint) for part in SYSTEMS[name].parts if part in found}
            beside = {key: first.fingerprint.get(key) for key in ("clips", *SHARED)} | parts
            # A recording is read once, for all that hear.
            beside |= {key: other.fingerprint[key] for other in found.values() for key in OF_SOUND
                       if key in other.fingerprint and key in checkpoint.fingerprint}
            change = differences(checkpoint.fingerprint, beside)
            refuse({f"{file_of(cfg, name)} was not trained with the models beside it ({change}): "
                    f"{TRAIN_AGAIN}": change})
            SYSTEMS[name].kind.check(checkpoint.spec, as_trained(cfg, checkpoint.settings))
            found[name] = checkpoint
    return found


def as_trained(cfg, saved, keys=Settings._fields):
    """Settings with those of a training that stand among `keys`, but for what was given or shapes none."""
    taken = set(cfg._fields).intersection(keys, saved).difference(FREE, cfg.given, ["test_views"])
    return cfg._replace(**{key: saved[key] for key in taken})


def refuse_contradictions(cfg, saved, encoder, where):
    """Raise a UserError when a flag that was given is not what a folder was made with.

    `saved` holds the settings of the folder, `encoder` the key of its text encoder's content.
    """
    for key in cfg.given:
        if key in FREE:
            continue
        asked, found = getattr(cfg, key), saved[key]
        same = Path(str(asked)).resolve() == Path(str(found)).resolve()  # ./a is a
        if key == "bert_model" and encoder and Path(asked).is_dir():
            same = encoder_digest(asked) == encoder
        refuse({f"{flag_of(key, asked)} contradicts {where}, made with {found!r}: leave that flag out or "
                "train with --phase all": not same})


# A recording is no speech when Whisper's no-speech probability is above this. Clips of RAVDESS and synthetic
# music and noise lie on either side: see archive/RESULTS.md.
NO_SPEECH_ABOVE = 0.5


def folder_of_models(cfg):
    """OUTPUT_DIR, or that of the SpeechEncoder which comes with this file, if none is trained or named.

    Raises UserError when it holds no models, or several runs.
    """
    folder = cfg.output_dir
    # That of the demo, one folder further down, is not meant.
    runs = sorted(Path(folder).glob("fold_*_seed_*/*_best.pth"))
    trained = any(file_of(cfg, name).exists() for name in TRAINED)
    if not (runs or trained or "output_dir" in cfg.given):
        # archive/head.py trained it on all of RAVDESS.
        shipped = Path(globals().get("__file__", "")).parent / "archive/SpeechEncoder_best.pth"
        refuse({f"{folder} holds no trained model, and {shipped}, which comes with this file, is not there: "
                f"fetch it, or {TRAIN_AGAIN}": not shipped.exists()})
        return str(shipped.parent)

    if runs and (not trained or len(saved_in(folder, "calibration", {})) > 1):
        raise UserError(f"{folder} holds several runs: name one of them, --output-dir {runs[0].parent}")
    refuse({f"{folder} holds no trained model: {TRAIN_AGAIN}": not trained})
    return folder


def choose_first(checkpoints, calibration, cfg):
    """Confidences below which answers are unsure, by system, that which is best on validation first."""
    windows, log_probs, labels = log_probs_of(checkpoints, ["validation"])
    answers = predict(log_probs, windows, calibration, cfg)
    asked = names_in(cfg.ask_systems) or [*answers]
    refuse({f"--ask-systems {cfg.ask_systems} is no list of names out of {', '.join(answers)}":
            set(asked).difference(answers)})
    # Who hears and has the least NLL, which is steadier than UAR; unless all of them read words.
    hearing = [name for name in asked if not reads_words(name)] or asked
    rows = np.arange(len(labels))
    first = max(hearing, key=lambda name: np.log(answers[name][rows, labels].clip(1e-7)).mean())
    return {name: fit_threshold(answers[name], labels) for name in [first, *asked]}


def whisper_loads(cfg, device):
    """Whether Whisper's weights are on this machine and usable; only a model that is named may be fetched."""
    named = "whisper_model" in cfg.given
    if named or whisper_file(cfg.whisper_model).exists():
        with only_warning(but=named):
            return bool(load_whisper(cfg.whisper_model, device))
    return False


@contextlib.contextmanager
def naming(recording):
    """An AudioError in here says the path of the recording, if it has one."""
    try:
        yield
    except AudioError as error:
        path = f"{recording}: " * isinstance(recording, (str, Path))
        raise AudioError(f"{path}{error}") from error


class Predictor:
    """The trained models of a folder, with nothing but their checkpoints, ready for any recording.

    Without a folder it has those of OUTPUT_DIR, or the SpeechEncoder that comes with this file. Other
    settings, such as where Whisper's weights lie (whisper_model) or who answers (ask_systems), can be given
    by name. Raises UserError when the folder holds no models that can answer, AudioError when a recording
    cannot be read.
    """

    @single_precision()
    def __init__(self, output_dir="", device="cpu", **settings):
        refuse({f"a Predictor knows no settings but {', '.join(OF_PREDICTOR)}":
                settings.keys() - set(OF_PREDICTOR)})
        if output_dir:
            settings["output_dir"] = str(output_dir)
        # Checked like flags.
        asked = settings | {"device": device}
        checked = vars(make_parser().parse_args([*map(flag_of, asked, asked.values())]))
        cfg = parse_settings([])._replace(phase="predict", given=tuple(settings), **checked)
        cfg = cfg._replace(output_dir=folder_of_models(cfg))
        self.checkpoints, self.device, self.models = checkpoints_together(cfg), pick_device(cfg), {}
        self.classes = next(iter(self.checkpoints.values())).classes
        self.calibration = calibrate(self.checkpoints, cfg)
        self.caveats = caveats_of_models(self.checkpoints)
        self.thresholds = choose_first(self.checkpoints, self.calibration, cfg)
        self.first, *_ = self.thresholds

        # What a training depends on is as that training had it, other settings as the last one.
        *_, last = self.checkpoints.values()
        self.cfg = as_trained(cfg, last.settings)
        for name, checkpoint in self.checkpoints.items():
            keys = {*checkpoint.fingerprint, *SYSTEMS[name].kind.pretrained}
            self.cfg = as_trained(self.cfg, checkpoint.settings, keys)
        self.has_whisper = whisper_loads(self.cfg, self.device)

    def predict(self, recording, sampling_rate=None, text=None):
        """A line per system: `predicted`, `unsure`, a probability per emotion, `gate`, `note`; a DataFrame.

        Of the systems that hear, the best on validation stands first. `recording` is a path, or an array of
        samples with `sampling_rate` in Hz; `text` is what is said, for the systems that read words: without
        it, those that hear answer alone. The answer to silence, music and noise is "no speech", as `gate`
        found.
        """
        with naming(recording):
            return self.as_a_whole(*self.hear(recording, sampling_rate, text=text))

    def predict_over_time(self, recording, sampling_rate=None):
        """A DataFrame with the first system's answer to each window: `start`, `end` in s, `voiced` 0 to 1."""
        with naming(recording):
            return self.over_time(*self.hear(recording, sampling_rate))

    @single_precision()
    def hear(self, recording, sampling_rate=None, span=WHOLE, text=None, transcribe=False):
        """(windows of a recording without their sound, log-probabilities of each model), PART by PART.

        `span` says from which second to which. Windows have `gate` and, if any is known, `transcript`: the
        text, or with `transcribe` Whisper's. Without speech `voiced` is 0, and no model is asked.
        """
        refuse({f"text {text!r} is no text: say as a str what is said, or leave it out":
                not isinstance(text, (str, type(None)))})
        tables, silent, said, start = [], [], [], span[0]
        for part, rate in sound_parts(recording, sampling_rate, span):
            if start > span[0] and len(part) < rate:  # the last moment
                break
            windows, heard = self.windows(part, rate)
            windows[["start", "end"]] += start
            start += len(part) / rate
            if not windows["voiced"].any():
                silent.append(windows.drop(columns=["mel", "samples"], errors="ignore"))
                continue
            if transcribe and text is None and self.has_whisper:
                text = transcript_of(heard, self.cfg, self.device)
            if text is not None:
                windows["transcript"] = text
            said.append(self.ask(windows))
            tables.append(windows.drop(columns=["mel", "samples"]))

        if not said:
            return pd.concat(silent, ignore_index=True), {}
        log_probs = {name: torch.cat([each[name] for each in said], dim=1) for name in said[0]}
        return pd.concat(tables, ignore_index=True), log_probs

    def windows(self, samples, rate):
        """The windows of samples (n, channels), who says whether they are speech, and the sound at 16 kHz."""
        try:
            clip = load_clip(samples, self.cfg, rate)
        except Silence:
            silent = {"clip": [""], "start": 0.0, "end": len(samples) / rate, "voiced": 0.0, "gate": "silent"}
            return pd.DataFrame(silent), None
        unknown = pd.Categorical([None], self.classes)
        windows = windows_of(pd.DataFrame([clip]).assign(clip="", emotion=unknown), self.cfg)
        heard = soxr.resample(clip.samples, self.cfg.sampling_rate, 16000)
        speech, gate = self.gate(clip, windows, heard)
        windows = windows.assign(voiced=windows["voiced"] * speech, gate=gate)
        windows["gate"] += f"; {clip.note}" * bool(clip.note)
        return windows, heard

    def gate(self, clip, windows, heard):
        """Whether there is speech in the windows of a clip, heard at 16 kHz, and who says so."""
        if not self.has_whisper:
            spread = spread_of(level_of(clip.mel))
            return spread > STEADY, f"level, which moves by {spread:.0f} dB"

        # Whisper knows better, for each 30 s of what is heard.
        decode = functools.partial(decode_with_whisper, cfg=self.cfg, device=self.device, sample_len=1)
        blocks = np.split(heard, range(480000, len(heard), 480000))
        probabilities = np.array([decode(block).no_speech_prob for block in blocks])
        begins = np.searchsorted(clip.seconds, windows["start"]) * self.cfg.hop_length  # in samples
        each = probabilities[(begins / self.cfg.sampling_rate // 30).astype(int)]
        return each < NO_SPEECH_ABOVE, list(map("Whisper, no-speech probability {:.2f}".format, each))

    def ask(self, windows):
        """What each model says to some windows, as `infer` gives it, by name."""
        # Weights are read when they are first needed: a recording without words needs no text encoder.
        able = [name for name in self.thresholds if "transcript" in windows or not reads_words(name)]
        refuse({f"all models of {self.cfg.output_dir} read words: say with --text what is said, or in a "
                "column text of --input (of --manifest: transcript)": not able})
        names = self.checkpoints.keys() & set(able).union(*(SYSTEMS[name].parts for name in able))
        for name in names.difference(self.models):
            self.models[name] = restore(self.checkpoints[name]).to(self.device)
        return {name: infer(self.models[name], windows, self.cfg, self.device) for name in names}

    def as_a_whole(self, windows, log_probs):
        """The table of `predict` from log-probabilities of the windows of one recording."""
        table = self.answers(windows, log_probs)
        table["gate"] = windows["gate"][windows["voiced"].idxmax()]
        table["note"] = [self.note_of(name, windows) for name in table.index]
        return table.rename(lambda name: SYSTEMS[name].title).rename_axis("model")

    def over_time(self, windows, log_probs):
        """The table of `predict_over_time` from log-probabilities of the windows of one recording."""
        # Each window is a clip of its own.
        table = self.answers(windows.assign(clip=windows.index), log_probs).loc[[self.first]]
        return windows[["start", "end", "voiced"]].join(table.reset_index(drop=True))

    def answers(self, windows, log_probs):
        """A line per system, its name the index, and clip of some windows: the first columns of `predict`."""
        found = predict(log_probs, windows, self.calibration, self.cfg)
        speech = windows.groupby("clip", sort=False)["voiced"].max() > 0
        found = found or {self.first: np.full((len(speech), len(self.classes)), np.nan)}
        tables = {name: pd.DataFrame(found[name], columns=self.classes)
                  for name in self.thresholds if name in found}
        table = pd.concat(tables).droplevel(1)
        predicted = table.fillna(0).idxmax(axis=1).where(np.tile(speech, len(tables)), NO_SPEECH)
        table.insert(0, "unsure", table.max(axis=1) < table.index.map(self.thresholds))
        table.insert(0, "predicted", predicted)
        return table

    def note_of(self, name, windows):
        """What must be said beside the answers of a system to some windows; "" if nothing."""
        models = [self.checkpoints[model] for model in (name, *SYSTEMS[name].parts)
                  if model in self.checkpoints]
        known = set().union(*(model.spec.get("vocabulary", ()) for model in models)) - {"<unk>"}
        said = words_in(windows.get("transcript", [""])[0])
        return ", ".join(holding({
            "trained on simulated sentences": "simulated" in [model.words for model in models],
            "it knows none of these words": known and known.isdisjoint(said),
        }))


Recording = namedtuple("Recording", "name path row", defaults=[{}])  # row: {column: text} of a table


def recordings_in(cfg):
    """The Recordings of --input: a file, a folder, a pattern or a table. Raises UserError if none."""
    path, recordings, passed = Path(cfg.input), [], []
    if path.suffix.lower() == ".csv":
        return recordings_listed(path)
    if path.is_file():  # whatever its name is
        return [Recording(printable(path.name), path)]

    found = map(Path, glob.glob(cfg.input, recursive=True))  # noqa: PTH207, which takes no absolute pattern
    if path.is_dir() and cfg.input:
        found = audio_files(path, ())
    for file in sorted(found):
        suffix = printable(file.suffix.lower())
        if file.is_dir():
            continue
        if file.name.startswith("."):  # a note of the system, such as ._a.wav
            passed.append("hidden")
        elif not file.is_file():
            passed.append("broken link")
        elif suffix in RECORDINGS:
            name = file.as_posix().removeprefix(f"{path.as_posix()}/")
            recordings.append(Recording(printable(name), file))
        else:
            passed.append(suffix or "no suffix")

    if passed:
        print(f"Not answered: {counted(pd.Series(passed))}", file=sys.stderr)
    reason = "holds no recordings" if path.exists() else "does not exist"
    refuse({f"--input {cfg.input} is an address of the web: download it first":
            re.match("[a-z]+://", cfg.input),
            f"--input {cfg.input!r} {reason}: name a recording, a folder, a pattern or a CSV of paths":
            not recordings})
    return recordings


def recordings_listed(path):
    """The Recordings of a table with a column path and maybe text, start and end (s). Raises UserError."""
    advice = "mend it or name another --input"
    recordings = []
    for row in read_table(path, ["path"], [], advice, others=True).to_dict("records"):
        name = " ".join([row["path"], row.get("start", ""), row.get("end", "")]).strip()
        file = path.parent / path_in(row["path"])
        recordings.append(Recording(name, file, row))
    refuse({f"{path} lists no recordings: {advice}": not recordings})
    return recordings


def answer_recording(recording, predictor, cfg):
    """All answers for one recording, a dict of columns with a line per system. Raises AudioError.

    They are those of `predict`, text, text_source and over_time: the path of a table of its windows, which
    a long one leaves with a plot.
    """
    row = recording.row
    span = float(row.get("start") or 0), float(row.get("end") or math.inf)
    text = row.get("text") or printable(cfg.text) or None
    windows, log_probs = predictor.hear(recording.path, span=span, text=text, transcribe=True)
    # Where the words come from: the first that holds.
    source, *_ = holding({
        "": not log_probs,
        cfg.input: row.get("text"),
        "--text": cfg.text,
        "no --text, and no weights of Whisper here: audio alone": not predictor.has_whisper,
        f"Whisper {predictor.cfg.whisper_model}": True})
    over_time = ""
    if len(windows) > 1 and log_probs and not reads_words(predictor.first):
        with only_warning():
            course = predictor.over_time(windows, log_probs)
            over_time = save_course(recording.name, course, predictor, folder_of_answers(cfg))
    table = predictor.as_a_whole(windows, log_probs).reset_index()
    text = windows.get("transcript", [None])[0]
    return dict(table) | {"text": text, "text_source": source, "over_time": over_time}


def answer_or_reason(recording, predictor, cfg):
    """What `answer_recording` returns, or one line with the error, which ends no batch."""
    single = recording.path == Path(cfg.input)
    try:
        return answer_recording(recording, predictor, cfg)
    except Exception as error:  # decoders, torch and a full memory raise many kinds
        if single and type(error) is UserError:
            raise
        reason = printable(str(error) or type(error).__name__)
    refuse({f"{cfg.input} cannot be used ({reason}): name another --input": single})
    return {"error": [reason], "key": ""}  # without a key it is tried again


def plain_name(name, key):
    """A name for files, from any name and from what must not share them: a/b.wav and a_b.wav are two."""
    return re.sub(r"[^\w.-]", "_", name)[-60:] + f"-{digest(key)[:6]}"


def save_course(name, course, predictor, folder):
    """Write the table and the plot of a recording over time; returns the path of the table as text."""
    path = Path(folder, f"{plain_name(name, name)}.csv")
    save_table(path, course, predictor.caveats)
    axis = course.plot.area("end", predictor.classes, figsize=(9, 3.5), xlabel="seconds",
                            ylabel="probability")
    legend_beside(axis, reverse=True)  # in the order of the stack
    save_figure(axis.figure, path.with_suffix(".png"), predictor.caveats,
                f"Emotion over time, {SYSTEMS[predictor.first].title}: {name}", words=False)
    return str(path)


def predictor_of(cfg):
    """The Predictor of OUTPUT_DIR, with the flags that say where encoders lie. Raises UserError."""
    own = {key: getattr(cfg, key) for key in ("output_dir", *OF_PREDICTOR) if key in cfg.given}
    return Predictor(device=cfg.device, **own)


def folder_of_answers(cfg):
    """The folder of the answers to --input, another one for each; beside it lies their table."""
    folder = Path(cfg.output_dir)
    if folder.exists() and not os.access(folder, os.W_OK):  # models may lie where nothing can be written
        folder = Path()
    return folder / "recordings" / plain_name(Path(cfg.input).name, str(Path(cfg.input).resolve()))


def key_of(recording, predictor, cfg):
    """A key of the bytes of a recording and of what else its answer depends on."""
    trained = [checkpoint.fingerprint for checkpoint in predictor.checkpoints.values()]
    parts = [recording.name, recording.row, trained, source_code(), predictor.cfg, predictor.has_whisper,
             cfg.text]
    with contextlib.suppress(OSError, MemoryError):
        parts.append(recording.path.read_bytes())
    return digest(*parts)


def start_table(path, columns, keys):
    """Begin a table of answers with what it holds of those with one of `keys`; returns these keys."""
    before = pd.DataFrame(columns=columns)
    # A kill may have cut off the last line: pandas' own parser would then read nothing.
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = pd.read_csv(path, dtype=str, keep_default_na=False, engine="python")[columns]
        whole = found["key"].isin(keys).groupby(found["recording"]).transform("all")
        before = found[whole]
    with only_warning():
        save(path, before)
        print(f"Answers go to {path}", file=sys.stderr)
        return set(before["key"])
    return set()


def columns_of(recordings, classes):
    """The columns of a table of answers: those of an answer, those of the table that lists the recordings."""
    first, last = "recording error model predicted unsure", "gate note text text_source over_time"
    names = [*first.split(), *classes, *last.split(), *recordings[0].row, "caveats", "key"]
    twice = sorted(name for name in {*names} - {"text"} if names.count(name) > 1)
    refuse({f"--input has columns that answers have too, {', '.join(twice)}: rename them": twice})
    return list(dict.fromkeys(names))


def predict_phase(cfg):
    """Answer for the recordings of --input, on the console and in a table that grows by each of them."""
    recordings, predictor = recordings_in(cfg), predictor_of(cfg)
    keys = [key_of(recording, predictor, cfg) for recording in recordings]
    columns = columns_of(recordings, predictor.classes)
    path = Path(f"{folder_of_answers(cfg)}.csv")
    # A single file is answered each time.
    done = start_table(path, columns, keys * (recordings[0].path != Path(cfg.input)))

    caveats = "; ".join(predictor.caveats)
    title = f"Recordings, {len(done)} of {len(keys)} answered before"
    for recording, key in zip(tqdm(recordings, title, disable=len(keys) < 2), keys):
        if key in done:
            continue
        answer = answer_or_reason(recording, predictor, cfg)
        known = {"recording": recording.name, "error": "", "caveats": caveats, "key": key}
        lines = pd.DataFrame(recording.row | known | answer, columns=columns)
        lines = lines.replace(r"[\r\n]+", " ", regex=True)  # a line each, also where a kill cuts
        with tqdm.external_write_mode():
            if cfg.json:
                print(lines.to_json(orient="records"), flush=True)
            else:
                print_answer(lines.to_dict("records"), predictor.classes)
        if path.is_file():
            lines.to_csv(path, mode="a", header=False, index=False, float_format="%.6f")
    if not cfg.json:
        print("\n" + "; ".join([*predictor.caveats, "trained on acted speech: not fit for judging people"]))


def print_answer(lines, classes):
    """One recording on the console: a bar per emotion by the first system, then the others."""
    first, *others = lines
    if first["error"]:
        print("\n{recording}: {error}".format_map(first))
        return
    print("\n{recording}: {predicted}".format_map(first) + " (unsure)" * int(first["unsure"]))
    if first["predicted"] == NO_SPEECH:
        question = "music or noise? " * ("silent" not in first["gate"])
        print(f"  {question}({first['gate']})")
        return

    for emotion in sorted(classes, key=first.get, reverse=True):
        share = first[emotion]
        print("  {:12} {:6.1%}  {}".format(emotion, share, "#" * round(40 * share)))
    for line in others:
        note, unsure = " ({note})" * bool(line["note"]), ", unsure" * int(line["unsure"])
        form = "  {model}" + note + ": {predicted} {:.1%}" + unsure
        print(form.format(line[line["predicted"]], **line))
    said = ": {text!r}" * isinstance(first["text"], str)
    over_time = "\n  Over time: {over_time} and .png beside it" * bool(first["over_time"])
    print(("  {model}. Speech: {gate}\n  Words: {text_source}" + said + over_time).format_map(first))


# %% 22. The demo
DEMO_VOICES = {  # pitch in semitones, syllables a second, strengths of harmonics 1, 3 and 7
    "neutral": (0, 4.0, 1.0, 0.5, 0.1),
    "calm": (-3, 2.5, 1.0, 0.1, 0.0),
    "happy": (5, 5.0, 1.0, 0.8, 0.5),
    "sad": (-2, 2.5, 1.0, 0.5, 0.0),
    "angry": (3, 5.0, 0.4, 1.0, 1.0),
    "fearful": (8, 6.5, 1.0, 0.2, 0.6),
    "disgust": (-5, 3.2, 0.2, 1.0, 0.3),
    "surprised": (9, 4.0, 1.0, 1.0, 0.1),
}


def synthesize(emotion, actor, rng, rate):
    """A synthetic clip, float samples (n,): three harmonics under an envelope of five syllables, no words."""
    pitch, tempo, *strengths = DEMO_VOICES[emotion]
    t = np.arange(int(rate * 5 / tempo)) / rate
    bend = 1 + 0.05 * np.sin(2 * np.pi * tempo / 3 * t + rng.uniform(0, 6))
    # Women speak higher than men, and every actor at a pitch of their own.
    base = (200, 115)[actor % 2] * 2 ** ((pitch + actor % 5 / 2 + rng.normal(0, 0.5)) / 12)
    phase = 2 * np.pi * np.cumsum(base * bend) / rate
    harmonics = sum(strength * np.sin(number * phase) for number, strength in zip((1, 3, 7), strengths))
    wave = harmonics * np.sin(np.pi * tempo * t) ** 2
    wave = np.pad(0.8 * wave / abs(wave).max(), rate // 5)
    return wave + rng.normal(0, 3e-4, len(wave))


def write_demo_corpus(folder, actors=range(1, 25), statements=(1, 2)):
    """Write synthetic clips under RAVDESS names, one per actor, emotion and statement, if missing."""
    for codes in itertools.product(actors, range(1, 9), statements):
        path = Path(folder, "Actor_{0:02}/03-01-{1:02}-01-{2:02}-01-{0:02}.wav".format(*codes))
        if not path.exists():
            actor, emotion, _ = codes
            samples = synthesize(EMOTIONS[emotion - 1], actor, np.random.default_rng(codes), 16000)
            with replacing(path) as temporary:
                soundfile.write(temporary, samples, 16000, "PCM_16")


def write_demo_encoder(folder):
    """Write a small, untrained DistilBERT that knows the words of the sentence bank, in the usual layout."""
    if Path(folder, "model.safetensors").exists():
        return
    transformers = load_transformers()
    # A vocabulary of whole words: every sentence of the bank can be read.
    words = sorted(set(words_in(" ".join(SENTENCES.values()))))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'", *words]
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(tokens), dim=64, n_layers=2, n_heads=4,
                                           hidden_dim=128)
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
    with replacing(folder) as temporary:
        transformers.DistilBertModel(config).save_pretrained(temporary)
        Path(temporary, "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")


def write_demo_whisper(path):
    """Write a tiny, untrained Whisper in its own format, if missing."""
    if not Path(path).exists():
        whisper = load_package("whisper.model", "pip install openai-whisper, or train without speech")
        torch.manual_seed(0)
        dims = whisper.ModelDimensions(80, 1500, 16, 2, 1, 51865, 16, 16, 2, 1)
        model = whisper.Whisper(dims)
        nn.init.normal_(model.decoder.positional_embedding)  # Whisper leaves it as the memory was
        with replacing(path) as temporary:
            torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, temporary)


def write_demo(cfg):
    """Write the corpus and the pretrained encoders of the demo where they are missing. Raises UserError."""
    refuse({f"{cfg.output_dir} holds a real run: name another --output-dir for --demo":
            not saved_in(cfg.output_dir, "settings", {}).get("demo", True)})
    with filelock.FileLock("archive/demo/run.lock"):  # a demo beside this one may be at it
        write_demo_corpus(cfg.ravdess_path)
        if "bert_model" not in cfg.given and "bert" in cfg.run_models:
            write_demo_encoder(cfg.bert_model)
        if "whisper_model" not in cfg.given:
            with only_warning():
                write_demo_whisper(cfg.whisper_model)


# %% 23. The phases and main
def describe_corpus(corpus):
    """What was found, used and left out, as a list of sentences; left_out.csv has the rest."""
    clips, left_out = corpus.clips, corpus.left_out
    # Files that are no clips are counted by kind, damaged clips are named.
    kinds = left_out["reason"].where(left_out["reason"].isin(PASSED_OVER), "unusable")
    broken = left_out[kinds == "unusable"]
    named, notes = "" not in set(clips["actor"]), clips.loc[clips["note"] != "", "note"]
    speakers = f" of {plural(clips['actor'].nunique(), 'actor')}" * named
    sentences = holding({
        f"{len(clips) + len(left_out)} files in {corpus.source}: {len(clips)} clips{speakers} are used; left "
        f"out: {counted(kinds)} (left_out.csv).": True,
        f"Clips per emotion: {counted(clips['emotion'])}.": True,
        f"Clips per actor: {counted(clips['actor'])}.": named,
        "No speakers are named: splits may share voices, which flatters, and intervals draw single clips, "
        "which makes them too narrow.": not named,
        f"Notes on their sound: {counted(notes)}.": len(notes)})

    if "statement" in clips:
        sentences.append(missing_clips(clips))
    sentences += same_bytes(clips)
    sentences += itertools.starmap("Left out: {}: {}.".format, broken[:10].to_numpy())
    return sentences + holding({f"Left out: {len(broken) - 10} more, see left_out.csv.": len(broken) > 10})


def same_bytes(clips):
    """How many sounds have several names, with the names and emotions of the first, as sentences."""
    names = clips["clip"] + " (" + clips["emotion"].astype(str) + ")"
    same = names[clips.duplicated("digest", keep=False)].groupby(clips["digest"]).agg(list)
    return [f"Same bytes under several names: {plural(len(same), 'time')}, the first {' = '.join(first[:5])}."
            for first in same[:1]]


def counted(column):
    """How often each value of a column occurs, as text: happy 12, sad 14."""
    sizes = column.groupby(column, observed=True).size().items()
    return ", ".join(itertools.starmap("{} {}".format, sizes)) or "none"


def missing_clips(clips):
    """What is missing of RAVDESS's 24 x 60 clips, or of those of some emotions, as a sentence."""
    emotions = {EMOTIONS.index(emotion) + 1 for emotion in classes_of(clips)}
    emotions.update(clips["clip"].str[6:8].map(int))  # --merge gives them other names
    codes = itertools.product(emotions, (1, 2), (1, 2), (1, 2), range(1, 25))
    # Neutral is never strong.
    expected = {"03-01-{:02}-{:02}-{:02}-{:02}-{:02}".format(*code) for code in codes if code[:2] != (1, 2)}
    missing = sorted(expected.difference(clips["clip"]))
    first = f", the first {missing[0]}" if missing else ""
    return f"Missing from the {len(expected)} clips of RAVDESS: {len(missing)}{first}."


def title_of_split(corpus, cfg):
    """What to call the split of a run, or those of several."""
    folds = cfg.folds.replace(",", ", ")
    if corpus.split in BY_SPEAKER:
        return f"fold{'s' * (',' in folds)} {folds}"
    return {"random": "random split", "manifest": "split of the manifest"}.get(corpus.split, "all its clips")


def describe_split(clips, corpus, run):
    """The clips and actors of each split, and how many actors stand in several, as one sentence."""
    texts = []
    for split in SPLITS:
        part = clips.query("split == @split")
        actors = " ".join(map(str, sorted(set(part["actor"]))))
        texts.append(f"{split} {len(part)} clips" + f" of actors {actors}" * bool(actors))

    splits = clips.groupby("actor")["split"].nunique()
    shared = sum(splits.drop("", errors="ignore") > 1)
    other = clips["emotion"] != clips.get("sentence_emotion", clips["emotion"])
    why = {"text": "with a sentence that other splits have", "half": "every other one"}.get(
        corpus.split, "since their sound occurs in an earlier split")
    left = len(corpus.clips) - len(clips)
    segments = sum(span != WHOLE for span in clips.get("span", []))
    texts += holding({
        f"{plural(segments, 'segment')} of files": segments,
        "loss weighted by class": class_targets(clips.query("split == 'train'"), run).max() > 1,
        f"{plural(shared, 'actor')} in several splits": shared,
        f"{other.mean():.1%} of the clips with a sentence of another emotion ({run.sentence_noise:.1%} dealt "
        "anew)": other.any(),
        f"{plural(left, 'clip')} left out, {why}": left})
    return f"{title_of_split(corpus, run).capitalize()}: {'; '.join(texts)}."


def describe_transcripts(corpus):
    """How well Whisper heard RAVDESS's statements, overall and by emotion, as sentences."""
    clips = corpus.clips
    if corpus.words != "whisper" or "transcript" not in clips:
        return []
    sentences = [f"{(clips['transcript'] == '').sum()} of {len(clips)} transcripts are empty."]
    if "statement" in clips:
        rates = clips.groupby("emotion", observed=True)[["statement", "transcript"]].apply(word_error_rate)
        sentences += [
            f"Word error rate of Whisper: {word_error_rate(clips):.1%}, {rates.round(3).to_dict()}.",
            "RAVDESS's two statements are spoken in every emotion: true transcripts carry no label, so "
            "systems that read words alone are expected at chance."]
    return sentences


def write_data(corpus, clips_of, cfg):
    """Write what the data are like, for the user's own code and for the report; the audit as sentences."""
    from sklearn.preprocessing import LabelEncoder
    audit = describe_corpus(corpus) + describe_transcripts(corpus)
    audit += dict.fromkeys(describe_split(clips, corpus, run) for run, clips in clips_of.items())
    audit += [
        "Plots show boxes for names of emotions unless a font for their script is installed, such as Noto "
        "Sans CJK or Noto Sans Thai."] * (max(str(classes_of(corpus.clips))) > "\u0900")
    print(*audit, sep="\n")
    folder, encoder = Path(cfg.output_dir), LabelEncoder()
    encoder.classes_ = np.array(classes_of(corpus.clips))  # fit() would sort them
    save(folder / "label_encoder.pkl", pickle.dumps(encoder))
    save(folder / "audit.json", {"audit": audit, "caveats": corpus.caveats})
    save_table(folder / "left_out.csv", corpus.left_out, corpus.caveats)

    for run, clips in reversed(clips_of.items()):  # the plots are those of the first run
        path = Path(run.output_dir, "clips.csv")
        save_table(path, clips.drop(columns=FEATURES), corpus.caveats)
        if corpus.words in ("simulated", "whisper"):
            texts = pickle.dumps(dict(zip(clips["clip"], clips["transcript"])))
            save(path.with_name(f"ravdess_transcripts_{corpus.words}.pkl"), texts)
    subject = f"{corpus.name}, {title_of_split(corpus, run)}"
    plot_counts(clips, subject, folder, corpus.caveats)
    plot_samples(clips, subject, cfg, corpus.caveats)
    return audit


def models_asked(cfg, corpus):
    """The models that RUN_MODELS, FUSION and PHASE ask for, and the parts that these need, parts first."""
    # RUN_MODELS names early fusions; FUSION says of which kind.
    kinds = {"concat": ["fusion"], "attention": ["attention"]}.get(cfg.fusion, ["fusion", "attention"])
    asked = {name.replace("fusion", kind) for name in names_in(cfg.run_models) for kind in kinds}
    if cfg.phase in ("unimodal", "fusion"):
        asked = {name for name in asked if bool(SYSTEMS[name].parts) == (cfg.phase == "fusion")}
    asked |= {part for name in asked for part in SYSTEMS[name].parts}
    able = [name for name in TRAINED if name in asked and (corpus.has_words or not reads_words(name))]
    refuse({f"--run-models {cfg.run_models} leaves --phase {cfg.phase} nothing to do": not asked,
            corpus.words: not able})
    return able


def train_run(run, names, clips, corpus, device):
    """Train the models of a run that are not up to date.

    Returns all checkpoints that are then there and valid, and by name why pretrained weights cannot be had.
    """
    reasons, lacking = {}, {}
    print(f"\nPlan: {versions(device)['hardware']}, results in {run.output_dir}"
          + ", edits of the code are not noticed in a notebook" * (not definitions()))
    for name in names:
        reasons[name], what = plan_of(run, name, clips, reasons)
        if reasons[name] and not_available(run, name, lacking):
            what = f"cannot run: {lacking[name]}"
        print(f"  {SYSTEMS[name].title:24} {what}", flush=True)

    refuse({why: len(lacking) == len(names) for why in lacking.values()})
    for name in names:
        if reasons[name] and name not in lacking:
            train_system(run, name, clips, corpus, device)
    there = {name: read_checkpoint(run, name) for name in TRAINED if not stale_because(run, name, clips)}
    return there, lacking


def not_available(run, name, lacking):
    """Whether the weights that a system or its parts start from cannot be had; `lacking` says by name why.

    Raises UserError where the command line names these weights.
    """
    system = SYSTEMS[name]
    for part in lacking.keys() & system.parts:
        lacking[name] = lacking[part]
    try:
        system.kind.prepare(run)  # now: after an hour it is too late to miss it
    except UserError as error:
        if set(system.kind.pretrained) & set(run.given):
            raise
        lacking[name] = str(error)
    return name in lacking


def plan_of(run, name, clips, reasons):
    """(why a system is trained, "" if not; what the plan says of it); `reasons` has those of its parts."""
    checkpoint, state = file_of(run, name), file_of(run, name, "_training.pth")
    parts = [f"since {SYSTEMS[part].title} is" for part in SYSTEMS[name].parts if reasons.get(part)]
    reason = " and ".join(parts) or stale_because(run, name, clips)
    if reason and not parts and take_back(run, name, clips):
        return "", "taken back, the training that replaced it is kept"
    if reason:
        return reason, f"is trained ({reason})"
    if state.exists() and state.stat().st_mtime <= checkpoint.stat().st_mtime:
        state.unlink()  # the training was killed in its last moment
    return "", "used again"


def not_run(answered, cfg, corpus, lacking):
    """Why systems that could be asked for have no answers, by name; `lacking` has those without weights."""
    # Nobody misses the kind of early fusion that was not asked for, nor the ensemble of a single seed.
    hidden = {"concat": AttentionFusion, "attention": EarlyFusion}.get(cfg.fusion)
    reasons = {}
    for name, system in SYSTEMS.items():
        if name not in answered and system.kind not in (hidden, ensemble, adapted):
            found = [lacking[part] for part in (name, *system.parts) if part in lacking]
            if reads_words(name) and not corpus.has_words:
                found = [corpus.words]
            reasons[name], *_ = [*found, "not asked for, or not trained"]
    return reasons


def write_results(cfg, corpus, lacking, table, histories, **facts):
    """Write the results of a run or of an evaluation and facts about its models, then show them."""
    ran, test = list(table["system"].unique()), table[table["split"] == "test"]
    subject = [corpus.name, title_of_split(corpus, cfg), plural(test["clip"].nunique(), "test clip")]
    if "" not in set(test["actor"]):
        subject.append(plural(test["actor"].nunique(), "speaker"))
    missing = not_run(ran, cfg, corpus, lacking)
    oracles = [*filter(reads_words, ran)] * (corpus.words == "simulated")
    titles = {name: system.title + " (oracle text)" * (name in oracles)
              for name, system in SYSTEMS.items() if name in [*ran, *missing]}
    save_results(cfg.output_dir, {
        "corpus": corpus.name,
        "subject": ", ".join(subject),
        "date": time.strftime("%Y-%m-%d"),
        "settings": cfg._asdict(),
        "versions": versions(pick_device(cfg)),
        "classes": classes_of(corpus.clips),
        "titles": titles,
        "oracles": oracles,
        "unseen_actors": unseen_actors(corpus.clips) if corpus.split in BY_SPEAKER else [],
        "not_run": missing,
        **facts,
    }, predictions=table, histories=histories)
    # What was written is read back, so that a report made later has the same figures to the last digit.
    publish(read_results(cfg.output_dir))


def publish(results):
    """Tables on the console, metrics.json, plots and report of Results. Raises UserError."""
    # A flat list: a dict per system, split and group; `by` says what groups.
    metrics = []
    for by in GROUPS:
        if set(by.split()) <= set(results.predictions):
            figures = figures_of(results, *by.split()).reset_index()
            metrics += figures.assign(by=by).to_dict("records")
    save(results.folder / "metrics.json", metrics)
    table, caveats = table_of(results), "; ".join(results.config["caveats"]) or "unseen speakers"
    title = f"{results.config['subject']} ({caveats})"
    print(f"\n{title}\n{table.to_string(index=False)}", flush=True)
    # A LaTeX document needs the package booktabs for it.
    save(results.folder / "results.tex", f"% {title}\n{table.to_latex(index=False, escape=True)}".encode())
    draw_plots(results)
    with only_warning():
        write_report(results)
        print(f"Report: {results.folder / REPORT}")


def train_phase(cfg):
    """Train what is missing, and write the results of everything that is there. Raises UserError."""
    device = pick_device(cfg)
    if cfg.demo:
        write_demo(cfg)
    if cfg.download:
        download_corpus(cfg)
    corpus = read_corpus(cfg)
    names = models_asked(cfg, corpus)
    if corpus.words == "whisper" and any(map(reads_words, names)):
        corpus = replace(corpus, clips=transcribe(corpus.clips, cfg, device))

    # First the splits of all runs: a fold that cannot be ends it here.
    refuse_gaps(corpus, runs_of(cfg))
    clips_of = {run: add_transcripts(split_clips(corpus, run), corpus, run) for run in runs_of(cfg)}
    if cfg.only_run:
        train_only(cfg, clips_of, names, corpus, device)
        return
    audit = write_data(corpus, clips_of, cfg)
    if cfg.phase == "data":
        return
    with only_warning():  # now: after an hour of training it comes late
        load_docx()
    trained, lacking = {}, {}
    for run, clips in clips_of.items():
        trained[run], why = train_run(run, names, clips, corpus, device)
        lacking |= why
    write_results(cfg, corpus, lacking, **results_of(trained, clips_of), audit=audit, command=command_of(cfg))


def train_only(cfg, clips_of, names, corpus, device):
    """Train the run ONLY_RUN, what it says into its log.txt; with --phase data see that it can be."""
    run = list(clips_of)[cfg.only_run - 1]
    if cfg.phase == "data":
        return
    path = Path(run.output_dir, "log.txt")
    with path.open("w", encoding="utf-8", errors="replace") as log, contextlib.redirect_stdout(log):
        train_run(run, names, clips_of[run], corpus, device)


def results_of(trained, clips_of):
    """The table of predictions, histories, caveats, calibration by run and key of the encoder of runs."""
    # A system that some run lacks would be compared on other clips than the others.
    everywhere = set.intersection(*map(set, trained.values()))
    tables, histories, calibration, caveats = [], [], {}, []
    for run, checkpoints in trained.items():
        checkpoints = {name: checkpoints[name] for name in checkpoints if name in everywhere}
        key, clips, folder = {"fold": run.fold, "seed": run.seed}, clips_of[run], Path(run.output_dir).name
        caveats += caveats_of_models(checkpoints)
        windows, log_probs, _ = log_probs_of(checkpoints)
        calibration[folder] = calibrate(checkpoints, run)
        answers = predict(log_probs, windows, calibration[folder], run)
        tables.append(predictions_table(answers, clips, classes_of(clips), **key))
        for name, checkpoint in checkpoints.items():
            facts = {"system": name, "parameters": parameters_of(checkpoint), "run": folder, **key}
            histories += [epoch | facts for epoch in checkpoint.history]
    return {
        "table": with_ensembles(pd.concat(tables, ignore_index=True), classes_of(clips)),
        # What is solved at once has no epochs; a row that is taken away again names the columns then.
        "histories": pd.DataFrame(histories or [facts])[:len(histories)],
        "caveats": list(dict.fromkeys(caveats)),
        "calibration": calibration,
        "encoder": encoder_of(checkpoints)}


def parameters_of(checkpoint):
    """How many parameters were trained: not those of frozen parts, nor what normalisation counts."""
    return sum(tensor.numel() for part, tensor in checkpoint.weights.items()
               if not re.search("^encoders|running_|_tracked", part))


def report_phase(cfg):
    """Tables, plots and report again from the results in OUTPUT_DIR, without models and corpus."""
    results, path = read_results(cfg.output_dir), Path(cfg.output_dir, "config.json")
    config = results.config
    refuse_contradictions(cfg, config["settings"], config["encoder"], path)
    refuse({f"{path} is not of the data beside it, audit.json: make it again with --phase all":
            saved_in(cfg.output_dir, "audit", config["audit"], "audit.json") != config["audit"]})
    publish(results)


AS_IT_IS = {  # settings with which another corpus is read, whatever the training had; for companions too
    "split": "speaker", "folds": "0", "runs": 1, "demo": False, "leave_out": "",
    "use_simulated_sentences": False, "sentence_noise": 0.0, "sentences_csv": ""}


def evaluate_phase(cfg):
    """Score the models of OUTPUT_DIR, as they were trained, on another corpus; into a folder of its own."""
    predictor = predictor_of(cfg)
    folder = predictor.cfg.output_dir
    # Features are kept, beside one's own results and not where the file lies.
    predictor.cfg = predictor.cfg._replace(phase="evaluate", output_dir=cfg.output_dir, merge=cfg.merge,
                                           manifest=cfg.manifest)
    encoder = encoder_of(predictor.checkpoints)
    refuse_contradictions(cfg, predictor.cfg._asdict(), encoder, folder)
    # The features are those of the training, the corpus is another one.
    work = predictor.cfg._replace(output_dir=evaluation_folder(cfg), given=cfg.given, fusion="both",
                                  **AS_IT_IS)
    whole = read_corpus(work, predictor.classes)
    corpus = shared_emotions(whole, predictor.classes, cfg)
    classes, emotions = classes_of(corpus.clips), whole.clips["emotion"]
    audit = [*describe_corpus(whole),
             f"Emotions compared: {', '.join(classes)} (also called {', '.join(SYNONYMS)}).",
             f"Clips left out, unknown to the models: {counted(emotions[~emotions.isin(classes)])}. (--merge "
             "NAME=EMOTION counts them.)",
             "Temperatures and fusion weights are those of the training; adapted takes something of these "
             "clips, mean and deviation. Probabilities are renormalised over the emotions that both know."]
    print(*audit, sep="\n")
    save_table(Path(work.output_dir, "left_out.csv"), whole.left_out, predictor.caveats)
    write_results(work, corpus, {}, elsewhere(predictor, corpus), pd.DataFrame(columns=["system"]),
                  caveats=caveats_elsewhere(predictor, corpus, folder, cfg), encoder=encoder, audit=audit,
                  calibration={"training": predictor.calibration}, command=command_of(cfg))


def evaluation_folder(cfg):
    """The folder of the evaluation on a table, which must not hold that of another one. Raises UserError."""
    folder = Path(cfg.output_dir, f"evaluation_{Path(cfg.manifest).stem}")
    other = saved_in(folder, "settings", {}).get("manifest", cfg.manifest)
    refuse({f"{folder} holds the figures of {other}: move it away, or rename {cfg.manifest}":
            Path(other).resolve() != Path(cfg.manifest).resolve()})
    return str(folder)


def shared_emotions(corpus, classes, cfg):
    """A corpus without the clips whose emotion is none of `classes`, all of it test. Raises UserError."""
    there = set(corpus.clips["emotion"])  # not those that only unusable clips have
    shared = [emotion for emotion in classes if emotion in there]
    refuse({f"{cfg.manifest} has {', '.join(shared) or 'no emotion'} in common with the models of "
            f"{cfg.output_dir}, fewer than two of {', '.join(classes)}: see --manifest and --merge":
            len(shared) < 2})
    emotions = corpus.clips["emotion"].cat.set_categories(shared)
    clips = corpus.clips.assign(split="test", emotion=emotions).dropna(subset="emotion", ignore_index=True)
    words = "manifest" if "transcript" in clips else f"{cfg.manifest} has no column transcript"
    return replace(corpus, clips=clips, words=words, split="all")


def caveats_elsewhere(predictor, corpus, folder, cfg):
    """What every page must say of trained models on another corpus, also which clips they know, by sound."""
    windows, *_ = log_probs_of(predictor.checkpoints, ["train", "validation"])
    parts = spans_in(pd.concat([corpus.clips["digest"], windows["digest"]], ignore_index=True))
    here = parts.index < len(corpus.clips)
    known = sum(heard_among(parts, ~here)[here])
    caveats = holding({
        f"models of {folder} on another corpus": True,
        f"merged: {cfg.merge}": cfg.merge,
        f"{known} of these {len(corpus.clips)} clips are known from training: the figures flatter": known})
    return caveats + [f"in training: {caveat}" for caveat in predictor.caveats]


def elsewhere(predictor, corpus):
    """The predictions of trained models on another corpus, over the emotions that both know."""
    windows = windows_of(corpus.clips, predictor.cfg)
    log_probs, calibration = predictor.ask(windows), predictor.calibration
    if "speech" in log_probs:
        log_probs["speech_adapted"] = adapted(windows, predictor.checkpoints["speech"], predictor.cfg,
                                              predictor.device)
        calibration = calibration | {"speech_adapted": calibration["speech"]}
    answers = predict(log_probs, windows, calibration, predictor.cfg)
    classes = classes_of(corpus.clips)
    # What counts as another emotion does so in clips and in answers.
    names = counted_as(predictor.cfg, predictor.classes)
    own = np.array([names.get(name, name) for name in predictor.classes])
    counts = (own[:, None] == np.array(classes)).astype(float)  # (C, K)
    for name in answers:
        shares = (answers[name] @ counts).clip(1e-7)
        answers[name] = shares / shares.sum(axis=1, keepdims=True)
    return predictions_table(answers, corpus.clips, classes, fold=0, seed=0)


@contextlib.contextmanager
def locked(cfg):
    """Keep other runs out of all folders that this one writes to, until it ends or is killed."""
    ours, wait = [run.output_dir for run in runs_of(cfg)], 0
    folders = {cfg.output_dir, *ours}
    if cfg.only_run:  # whoever is at work on it does what is asked for
        folders, wait = {ours[cfg.only_run - 1]}, -1
    if cfg.phase in ("report", "evaluate"):  # which make no folder when there is nothing to read
        folders = {folder for folder in folders if Path(folder).exists()}
    with contextlib.ExitStack() as locks:
        for folder in sorted(folders):
            try:
                locks.enter_context(filelock.FileLock(Path(folder, ".run.lock"), timeout=wait))
            except filelock.Timeout:
                raise UserError(f"another run is at work in {folder}: wait until it ends or name another "
                                "--output-dir") from None
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error}): name another --output-dir") from error
        yield


@single_precision()
def main(argv=None):
    """Do what the settings ask for; `argv` as on the command line. Raises UserError."""
    cfg = parse_settings(argv)
    definitions()  # now: what is edited during a run is not what it runs
    plt.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
    # Only those that are here: to look for another one takes time with every text that is drawn.
    fonts = [font for font in FONTS.split(",") if font in font_manager.get_font_names()]
    plt.rcParams["font.family"] = [*dict.fromkeys(plt.rcParams["font.family"] + fonts)]
    warnings.filterwarnings("ignore", "Glyph")  # one a letter and plot: write_data says it once
    # Surroundings that would end in a traceback: a stderr that is closed, a console with few letters.
    sys.stderr = sys.stderr or io.StringIO()  # closed; tqdm would stumble
    if not in_kernel():
        plt.switch_backend("agg")
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # consoles that know few letters

    if cfg.phase == "predict":  # which changes no result
        predict_phase(cfg)
        return
    phase = {"report": report_phase, "evaluate": evaluate_phase}.get(cfg.phase, train_phase)
    with locked(cfg):
        phase(cfg)


def run_script(main, *argv):
    """Call main(*argv) as a script: what stops it is one sentence and an exit code, for companions too."""
    try:
        main(*argv)
        print(end="", flush=True)  # now, while a pipe that is closed can still be told
    except BrokenPipeError:  # whoever reads has had enough, such as head
        os._exit(1)  # at once: Python would complain as it ends
    except (UserError, OSError, KeyboardInterrupt) as stop:
        sentence = str(stop) or "stopped; what is finished is kept"
        if in_kernel():
            raise UserError(sentence) from None
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 2)


# %% 24. Run
if __name__ == "__main__":
    run_script(main)
