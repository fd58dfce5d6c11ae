# %% [markdown]
"""
# Speech emotion recognition on RAVDESS: sound, words, and both

Trains and compares seven ways to tell eight emotions apart on speakers the models have never heard:

    clip --> log-mel spectrogram ------------> AudioCNN ----------.---> early fusion: joined features,
     |                                                            |     one new classification head
     '--> transcript (simulated | Whisper) --> TextRNN, TextBERT -'---> late fusion: mean of probabilities

    python emotion_recognition.py                          everything, on the corpus in archive/
    python emotion_recognition.py --demo                   everything, on a small synthetic corpus
    python emotion_recognition.py --phase fusion --epochs-cnn 5      a part of it, other settings
    python emotion_recognition.py --help                   every setting is a constant and a flag

The README holds the measured figures and the commands that measured them.

Simulated sentences are drawn by label: they show what the code does, not what words tell about feelings.
"""

# %% 2. Imports
import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
import soxr
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn import metrics
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

# %% 3. Configuration: every constant is a flag (EPOCHS_CNN -> --epochs-cnn), its comment the help text
# fmt: off
# What to run
RAVDESS_PATH = "./archive/audio_speech_actors_01-24/"  # folder that is searched for RAVDESS speech clips
OUTPUT_DIR = "outputs"           # folder for checkpoints, tables, plots and the report
PHASE = "all"                    # stages to run; fusion also trains the parts that it lacks
RUN_MODELS = "cnn,rnn,bert,fusion_rnn,fusion_bert"  # models to train, comma-separated
DEMO = False                     # a small synthetic corpus instead, results in OUTPUT_DIR/demo
DEVICE = "auto"                  # where to compute; auto takes the fastest that is there
SEED = 42                        # seed of initialisation, order, augmentation and sentences
# Splits
SPLIT = "speaker"                # speaker: no actor in two splits; random: by clip (optimistic)
FOLDS = "0"                      # which fifth of the actors is the test split, 0 to 4
# Words
USE_SIMULATED_SENTENCES = True   # sentences drawn by label (an oracle); no: Whisper transcripts
WHISPER_MODEL = "base"           # Whisper checkpoint, a name or a file
BERT_MODEL = "distilbert-base-uncased"  # pretrained text encoder, a hub name or a folder
MAX_TOKENS = 40                  # longest transcript, in words or word pieces
# Sound
SAMPLING_RATE = 16000            # in Hz, everything is resampled to it
TRIM_DB = 30.0                   # silence is what lies this far below the clip's own peak
CLIP_SECONDS = 2.56              # length of the window that the network sees
N_MELS = 64                      # mel bands, 50 Hz to half the sampling rate
N_FFT = 1024                     # samples in an FFT window
HOP_LENGTH = 256                 # samples between two frames
SPEEDS = "0.84,0.89,0.94,1,1.06,1.12,1.19"  # voices heard in training, as resampling factors
# Training; NAME_CNN, NAME_RNN, NAME_BERT or NAME_FUSION goes before NAME
EPOCHS_CNN = 60                  # passes over the training split, AudioCNN
EPOCHS_RNN = 20                  # the same, TextRNN
EPOCHS_BERT = 6                  # the same, TextBERT
EPOCHS_FUSION = 8                # the same, early fusion
BATCH_SIZE = 32                  # clips in a batch
LEARNING_RATE = 2e-3             # peak of the one-cycle schedule
LEARNING_RATE_BERT = 1e-4        # the same, TextBERT
WEIGHT_DECAY = 0.05              # AdamW, on weight matrices only
DROPOUT = 0.4                    # share of features dropped before a head
WORD_DROPOUT = 0.3               # share of words hidden in training
LABEL_SMOOTHING = 0.1            # share of the target spread over all emotions
MIXUP = 0.3                      # both parameters of the Beta distribution, 0 for none
EMA_DECAY = 0.99                 # moving average of the weights, per step
CLASS_WEIGHTS = False            # weight the loss by rarity
# fmt: on

SETTINGS = {name: type(value) for name, value in list(globals().items())
            if name.isupper() and type(value) in (bool, int, float, str)}
CHOICES = {
    "phase": ("all", "data", "unimodal", "fusion", "report"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "split": ("speaker", "random"),
    "folds": ("0", "1", "2", "3", "4"),
}
DEMO_SETTINGS = {"epochs_cnn": 8, "epochs_bert": 12, "epochs_fusion": 4, "learning_rate_bert": 2e-3}
TRAINING = "epochs batch_size learning_rate weight_decay dropout label_smoothing ema_decay class_weights".split()
FEATURES = "sampling_rate trim_db clip_seconds n_mels n_fft hop_length speeds".split()

EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]  # in code order
CITATION = ("Livingstone S. R., Russo F. A. (2018). The Ryerson Audio-Visual Database of Emotional Speech and "
            "Song (RAVDESS). PLoS ONE 13(5): e0196391. CC BY-NC-SA 4.0.",)

# %% 4. Command line, messages and files
class UserError(Exception):
    """What the user can mend, in one sentence; a script ends with exit code 2, a notebook cell with the sentence."""

    def _render_traceback_(self):
        """What Jupyter shows instead of a traceback."""
        return [f"error: {self}"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, so that a notebook cell survives them."""

    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


def help_texts():
    """The trailing comments of the configuration section, by constant name; empty where there is no file."""
    source = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    return dict(re.findall(r"^([A-Z_]+) = .+?  # (.+)$", source, re.MULTILINE))


def make_parser():
    """The command line: a flag per constant, its default read from the constant now."""
    parser = Parser(prog="emotion_recognition.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="Speech emotion recognition on RAVDESS: sound, words, and both.")
    texts = help_texts()
    for name, kind in SETTINGS.items():
        flag, text = "--" + name.lower().replace("_", "-"), f"{texts.get(name, '')} (default: {globals()[name]})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = CHOICES.get(name.lower())
            parser.add_argument(flag, type=kind, choices=choices, help=text, metavar=None if choices else kind.__name__)
    return parser


def parse_settings(argv=None):
    """Settings as a namespace of lower-case names: constants, then flags; `given` holds the flags' names."""
    if argv is None:
        argv = [] if "kernel_launcher" in sys.argv[0] else sys.argv[1:]
    given = vars(make_parser().parse_args(argv))
    values = {name.lower(): globals()[name] for name in SETTINGS}
    if (values | given)["demo"]:
        if "ravdess_path" in given:
            raise UserError("--demo makes its own corpus: leave out --demo or --ravdess-path")
        values.update({name: min(values[name], value) if name.startswith("epochs") else value
                       for name, value in DEMO_SETTINGS.items()}, ravdess_path="archive/demo/corpus", bert_model="archive/demo/distilbert")
        given["output_dir"] = str(Path(given.get("output_dir", values["output_dir"])) / "demo")
    cfg = SimpleNamespace(**(values | given), given=sorted(given))
    check_settings(cfg)
    return cfg


def check_settings(cfg):
    """Raise a UserError that names the first setting whose type or value cannot be."""
    for name, kind in SETTINGS.items():
        key, value = name.lower(), getattr(cfg, name.lower())
        flag = "--" + key.replace("_", "-")
        if not (type(value) is kind or kind is float and type(value) is int):
            raise UserError(f"{flag} {value!r} is not of type {kind.__name__}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{flag} {value!r} is none of {', '.join(CHOICES[key])}")
        if kind is int and value < (key != "seed"):
            raise UserError(f"{flag} {value} is too small: a whole number from {int(key != 'seed')} on")
        share = key.endswith(("dropout", "smoothing", "ema_decay"))
        if kind is float and not 0 <= value < (1 if share else math.inf):
            raise UserError(f"{flag} {value} is outside 0 to {'1' if share else 'any positive number'}")
    unknown = [name for name in names_in(cfg.run_models) if name not in MODELS]
    if unknown or not names_in(cfg.run_models):
        raise UserError(f"--run-models {cfg.run_models!r} names no model such as {', '.join(MODELS)}")
    try:
        speeds(cfg)
    except ValueError:
        raise UserError(f"--speeds {cfg.speeds!r} is not a list of numbers between 0.5 and 2") from None
    if cfg.clip_seconds * cfg.sampling_rate < 8 * cfg.hop_length:
        raise UserError(f"--clip-seconds {cfg.clip_seconds} is shorter than eight hops of --hop-length {cfg.hop_length}")


def names_in(text):
    """The comma-separated names of a setting, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def settings_for(cfg, name):
    """The training settings of one model: its own constant (EPOCHS_CNN) where there is one, else the common one."""
    suffix = "_" + MODELS[name].suffix
    return {key: getattr(cfg, key + suffix, getattr(cfg, key, None)) for key in TRAINING}


def marks(cfg):
    """What every page and plot must say about how its figures came to be; a list of short sentences."""
    return ([] if not cfg.demo else ["synthetic demo corpus: the figures mean nothing"]) + (
        [] if not cfg.use_simulated_sentences else ["text rows: simulated sentences (oracle)"]) + (
        [] if cfg.split == "speaker" else ["random split: speakers shared between splits"])


def in_kernel():
    """Whether this runs in a notebook kernel."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place when the block ends well: whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): free it or name another --output-dir") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write builtin containers as readable JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_table(path, table):
    """Write a DataFrame as CSV, six decimals."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")


def read_output(path, read):
    """read(path), or a UserError that says how to make the file that is missing or broken."""
    try:
        return read(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or not readable ({error}): make it with --phase all, "
                        "or name the finished run's --output-dir") from error


def in_parallel(function, items, title):
    """[function(item), ...] from a pool of threads, in order, with a progress bar; safe in notebooks and on Windows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(tqdm(pool.map(function, items), title, len(items), leave=False, disable=len(items) < 500))
    finally:
        torch.set_num_threads(threads)


def digest(*parts):
    """A short hexadecimal key of the content of strings, bytes and JSON-ready values."""
    sha = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        sha.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()[:16]


# %% 5. The corpus
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
CLIP_NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")
GET_RAVDESS = ("download Audio_Speech_Actors_01-24.zip from https://zenodo.org/records/1188976 and unpack it into "
               "archive/audio_speech_actors_01-24/",)


def find_corpus(cfg):
    """The folder that holds the clips: --ravdess-path, or the first usual place with RAVDESS names in it."""
    usual = cfg.ravdess_path == RAVDESS_PATH and "ravdess_path" not in cfg.given
    cache = Path(os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub"))
    places = [Path(cfg.ravdess_path)] + ([Path("archive"), Path("/kaggle/input"), cache] if usual else [])
    for place in places:
        if place.is_dir() and any(speech_files(place)):
            return place
    looked = ", ".join(map(str, places))
    if usual:
        raise UserError(f"no RAVDESS clips under {looked}: {GET_RAVDESS[0]}; or name a folder with --ravdess-path; "
                        "or try the synthetic corpus with --demo")
    path = places[0]
    why = ("does not exist" if not path.exists() else "is a file, not a folder" if path.is_file() else
           "is empty" if not any(path.iterdir()) else "holds no audio-only speech clips named like 03-01-05-01-02-01-12.wav")
    raise UserError(f"{path} {why}: name the folder of the RAVDESS clips with --ravdess-path")


def audio_files(folder):
    """(path, matched name or None) of every audio or video file under a folder, in sorted order."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not (f == "demo" and Path(root).name == "archive"))
        for file in sorted(files):
            path = Path(root, file)
            if path.suffix.lower() in (*AUDIO_SUFFIXES, ".mp4"):
                yield path, CLIP_NAME.fullmatch(path.stem)


def speech_files(folder):
    """The paths of audio-only speech clips under a folder."""
    return (path for path, name in audio_files(folder)
            if name and name[0].startswith("03-01") and path.suffix.lower() in AUDIO_SUFFIXES)


def index_clips(folder):
    """Find the audio-only speech clips under a folder.

    Returns a DataFrame with a row per clip, sorted by name (clip, path, emotion, actor, intensity, statement,
    repetition, sex, digest of the bytes), and the audit: counts of files and the files left out, with reasons.
    A name that occurs twice counts once; two names with the same bytes are both kept. Raises UserError.
    """
    audit = {"folder": str(folder), "files": 0, "song": 0, "video": 0, "other": 0, "twins": 0, "left_out": {}}
    found = {}
    for path, name in audio_files(folder):
        audit["files"] += 1
        if not name:
            audit["other"] += 1
        elif name[1] != "03" or path.suffix.lower() == ".mp4":
            audit["video"] += 1
        elif name[2] != "01":
            audit["song"] += 1
        elif path.stem in found:
            audit["twins"] += 1
        else:
            _, _, emotion, intensity, statement, repetition, actor = (int(code) for code in name.groups())
            if not (1 <= emotion <= 8 and {intensity, statement, repetition} <= {1, 2} and actor):
                audit["left_out"][str(path)] = "a code in its name is not one of RAVDESS"
                continue
            found[path.stem] = dict(clip=path.stem, path=str(path), emotion=EMOTIONS[emotion - 1], actor=actor,
                                    intensity=intensity, statement=statement, repetition=repetition,
                                    sex="male" if actor % 2 else "female")
    if not found:
        raise UserError(f"{folder} holds no usable RAVDESS speech clip: name another folder with --ravdess-path")
    clips = pd.DataFrame(sorted(found.values(), key=lambda row: row["clip"]))
    clips["digest"] = in_parallel(lambda path: digest(Path(path).read_bytes()), clips["path"], "Reading files")
    same = clips[clips.duplicated("digest", keep=False)].groupby("digest")["clip"]
    audit["same_bytes"] = [list(names) for _, names in same]
    return clips, audit


def complete_audit(clips, audit):
    """Add what is there and what is missing from 24 actors x 60 clips; returns the audit."""
    expected = {f"03-01-{e:02}-{i:02}-{s:02}-{r:02}-{a:02}" for a in range(1, 25) for e in range(1, 9)
                for i in (1, 2) for s in (1, 2) for r in (1, 2) if (e, i) != (1, 2)}
    audit["clips"] = len(clips)
    audit["per_emotion"] = {e: int((clips["emotion"] == e).sum()) for e in EMOTIONS}
    audit["per_actor"] = {str(a): int(n) for a, n in clips["actor"].value_counts().sort_index().items()}
    audit["missing"] = sorted(expected - set(clips["clip"]))
    return audit


def describe_audit(audit):
    """The audit as a list of sentences."""
    lines = [f"{audit['files']} audio and video files under {audit['folder']}: {audit['clips']} speech clips of "
             f"{len(audit['per_actor'])} actors used; {audit['twins']} second copies, {audit['song']} song, "
             f"{audit['video']} video and {audit['other']} other files passed over.",
             "Clips per emotion: " + ", ".join(f"{e} {n}" for e, n in audit["per_emotion"].items()) + ".",
             "Clips per actor: " + ", ".join(f"{n} x {count} clips" for count, n in
                                             sorted(Counter(audit["per_actor"].values()).items())) + "." ]
    lines.append(f"Missing from the 24 x 60 clips of RAVDESS: {len(audit['missing'])}"
                 + (f" (first: {audit['missing'][0]})." if audit["missing"] else "."))
    lines += [f"Same bytes under two names, both kept: {' = '.join(names)}." for names in audit["same_bytes"]]
    return lines + [f"Left out: {path}: {reason}." for path, reason in audit["left_out"].items()]


# %% 6. Splits
# The five folds of Luna-Jimenez et al. (2021), validation actors as in Mak-Sim/ResLSTM-SER.
TEST_ACTORS = ((2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22))
VALIDATION_ACTORS = ((3, 6), (10, 11), (8, 17), (1, 14), (2, 5))
SPLITS = ("train", "validation", "test")


def fold_actors(actors, fold):
    """(validation actors, test actors) of one fold; other corpora than the 24 actors go into up to five groups."""
    if sorted(actors) == list(range(1, 25)):
        return VALIDATION_ACTORS[fold], TEST_ACTORS[fold]
    groups = min(5, len(actors))
    if groups < 3 or fold >= groups:
        raise UserError(f"{len(actors)} actor(s) cannot be split into three by speaker (fold {fold}): give a "
                        "--ravdess-path with more actors, a lower --folds, or --split random")
    return actors[(fold + 1) % groups::groups], actors[fold::groups]


def split_clips(clips, cfg):
    """Add the column `split` (train, validation, test). Raises UserError when an emotion is missing in one."""
    clips = clips.copy()
    if cfg.split == "speaker":
        validation, test = fold_actors(sorted(int(a) for a in clips["actor"].unique()), int(cfg.folds))
        clips["split"] = np.select([clips["actor"].isin(test), clips["actor"].isin(validation)],
                                   ["test", "validation"], "train")
    else:
        once = clips.drop_duplicates("digest")  # the same bytes must not be on both sides
        try:
            train, rest = train_test_split(once, test_size=0.3, random_state=cfg.seed, stratify=once["emotion"])
            _, test = train_test_split(rest, test_size=0.5, random_state=cfg.seed, stratify=rest["emotion"])
        except ValueError as error:
            raise UserError(f"the clips under --ravdess-path are too few for --split random ({error})") from error
        clips["split"] = np.select([clips["digest"].isin(train["digest"]), clips["digest"].isin(test["digest"])],
                                   ["train", "test"], "validation")
    counts = pd.crosstab(clips["split"], clips["emotion"]).reindex(index=SPLITS, columns=EMOTIONS, fill_value=0)
    for split, emotion in zip(*np.nonzero(counts.to_numpy() == 0)):
        raise UserError(f"no clip of {EMOTIONS[emotion]!r} is left in the {SPLITS[split]} split of {clips['path'][0]} "
                        "and its neighbours: mend the --ravdess-path or choose other --folds")
    return clips


# %% 7. Sentences and transcripts
# Fold k tests the sentences k::5 of an emotion; cue words recur in all five fifths.
SENTENCES = {
    "neutral": """
        I paid the bill at the post office. | My appointment is at ten on Friday. | I take the bus to the
        shop. | I sent the letter on Friday. | The train to work leaves at ten. | The train was on time this
        morning. | The next bus leaves at six. | I have to pay the bill by Friday. | I left the keys on the
        kitchen table. | I need the form for the meeting. | The meeting is on Monday at ten. | I usually buy
        bread on Monday. | We need milk and bread for Sunday. | I usually go to work by train. | We usually
        have lunch at one. | He bought some bread at the shop. | I put his phone number on the list. | The
        shop is closed for lunch. | The office opens at nine on Monday. | I put the form on the table. | My
        keys are in the bag by the door. | I sent the form to the office. | She moved our lunch to Friday. |
        My next appointment is at six. | She printed the form for me. | The bus to work leaves at nine. | I
        called him about the meeting. | The box is on the office table. | The shopping list is in my bag. |
        The shop on my street closes at six.""",
    "calm": """
        I drink tea and watch the rain. | I fall asleep in a soft blanket. | I rest my hands and breathe out.
        | I slowly fall asleep by the fire. | A warm bath and a quiet night. | I close my eyes and breathe in.
        | There is no rush, rest a little. | I rest by the warm fire. | The lake is still and the air is warm.
        | The cat is asleep on my blanket. | The garden is still this evening. | We take a slow walk by the
        lake. | My bed is soft and warm. | We sit by the sea and watch the waves. | I listen to soft music in
        bed. | The waves come in slowly. | I listen to the slow waves. | I lie in bed and hear the rain. |
        There is no rush this evening. | I take a slow breath and let it go. | Sunday morning is slow and
        easy. | Soft rain falls on the window. | I sit in the garden with my tea. | The clouds drift by my
        window. | Warm rain falls on the lake. | The fire is low and the light is soft. | The house is quiet
        this evening. | My breathing is slow and easy now. | There is nothing to do but rest. | I lie in the
        grass by the lake.""",
    "happy": """
        The baby laughs when I sing to her. | I won the prize, come and celebrate. | He made me laugh so much.
        | I sing at work, life is so good. | My friends sang for my birthday. | I'm so proud, she passed the
        exam. | Best birthday I've had in my life. | I can't wait for our holiday. | The whole family came to
        celebrate. | We are having a baby, I can't wait. | Great news, the baby is here. | It's so good to
        sing with friends. | We laughed until the morning. | I passed the exam, let's celebrate. | I love my
        new job, it's wonderful. | We danced all night at the party. | I love having my family together. | I
        love this song, dance with me. | Come and dance, what a great day. | She gave me a hug and we laughed.
        | He came home with the best news. | I got the job, I can't stop smiling. | She said yes and we
        danced. | What wonderful news, I'm so proud. | We won and everyone cheered. | Our holiday starts
        today, let's go. | Our team won, what a wonderful day. | It was the best party of my life. | My baby
        can't stop smiling at me. | We sing and dance in the kitchen.""",
    "sad": """
        It hurts to see his old chair. | She left me and I eat alone now. | He died before I could say
        goodbye. | He left without saying goodbye. | Her side of the bed is empty now. | My life is so empty
        without her. | My friends are gone and I'm alone. | I miss my dad more every day. | His chair is empty
        now. | I miss him most at night. | Dad is gone, I never said goodbye. | I cried when he went into
        hospital. | It hurts to look at our old photos. | Mum is gone and I miss her voice. | I was in tears
        when she left. | My dog died last winter. | I lost everyone I had. | Nobody came to his funeral. | We
        lost the baby last winter. | I sit alone with his old photos. | Nobody calls me on Sunday anymore. | I
        miss the way she used to sing. | I cried in the kitchen last night. | I don't want to eat anymore. | I
        cried at the funeral. | I cried over his last letter. | I lost my best friend last winter. | The house
        is empty without mum. | I keep the last letter she wrote. | Mum used to call me every night.""",
    "angry": """
        You ruined a whole day of my work. | I'm sick of your excuses, get out. | You had no right to read
        that. | He was so rude I slammed the door. | Shut up, I told you to stop that. | I'm sick of you
        shouting at me. | How dare he blame me for this? | I told him to shut up and get out. | You lied to me
        about the money. | How dare you read my letters? | You broke it and you don't care. | I slammed the
        door because he lied. | Stop shouting at me all the time. | This is your fault, don't blame me. | Stop
        making excuses for him. | You lie and then you blame me. | It's your fault we are late again. |
        Enough, nobody here listens to me. | I told you a hundred times to stop. | I've had enough of your
        lies. | He cheated me out of my money. | You took my money without asking. | My boss lied to us again.
        | Enough, I slammed the phone down. | Don't talk to me like that. | Don't you dare touch my car again.
        | You never listen to what I told you. | Give me back my money right now. | You never listen, I'm sick
        of it. | Get out of my kitchen right now.""",
    "fearful": """
        Hide quick before he comes back. | My hands are shaking, I can't move. | He has a knife, we have to
        run. | Footsteps are coming up the stairs. | Don't move, he might hear us. | I'm shaking, please don't
        hurt me. | I locked myself in, please hurry. | I hear someone behind the door. | Please don't leave me
        in the dark. | I heard footsteps behind me. | There's a man outside with a knife. | Someone whispered
        my name at night. | Whisper, they might be watching us. | Quick, lock the door and hide. | Something
        moved behind the door. | Someone is watching our house. | It's dark and I hear footsteps. | I hide
        under the bed in the dark. | Someone is inside, I locked that door. | I heard a noise outside. | I
        want to scream but I can't move. | Help me, he's right behind me. | I heard a scream in the street. |
        My heart is pounding, please help me. | My legs are shaking, I can't run. | I won't go down the dark
        stairs. | A man was following me, so I ran. | Call the police, there's a man outside. | Someone is
        following me home. | There is someone at my window.""",
    "disgust": """
        Someone threw up all over the bus. | The bin is full of flies and worms. | There's a worm in my soup.
        | The cheese is green with mould. | I bit into a rotten apple. | His hands are greasy and filthy. |
        The kitchen floor is so sticky. | I nearly threw up from the smell. | There are flies all over the
        meat. | Ugh, I stepped in something slimy. | The rubbish stinks, take it out. | That meat makes my
        stomach turn. | Ugh, his breath smells rotten. | The toilet stinks and it's filthy. | The smell of it
        turns my stomach. | There is mould on the cheese. | The milk is sour, throw it away. | The fish is
        slimy and makes me gag. | Ugh, there's spit all over my cup. | Throw that mouldy bread away. | The
        toilet at work makes me gag. | There's slimy hair in the bath. | The sink is full of greasy hair. |
        Ugh, he spits on the kitchen floor. | The fridge stinks of sour milk. | There is a slimy hair in my
        soup. | Who left this filthy thing here? | Something rotten is in the fridge. | Ugh, the table is all
        sticky. | The bathroom is full of mould.""",
    "surprised": """
        I never expected a letter from him. | Really, you did that in one day? | Are you serious, I won the
        car? | My old boss called out of nowhere. | No way, she is your sister? | Suddenly the box was full of
        money. | Why is there a horse in the garden? | Wait, you mean he never left? | Oh, I thought you were
        in Paris. | I had no idea you could sing. | Are you serious, they picked me? | Wait, you are the new
        boss? | Wow, you came all this way for me? | Wow, I didn't know it was that big. | Wait, the whole
        shop is gone? | Oh wow, is that really for me? | I didn't know you two were sisters. | Wait, how did
        this get in my bag? | No way, you really know him? | What, you two are getting married? | He came to
        my door out of nowhere. | Since when do you speak French? | Suddenly the whole room cheered. | I never
        expected to see you here. | I can't believe you made all this. | How did he get in here? | I can't
        believe you have a twin. | I had no idea you were married. | Since when do you have a dog? | How did
        you know my name?""",
}

def sentence_bank():
    """The bank as a dict from emotion to its list of 30 sentences."""
    return {emotion: [" ".join(sentence.split()) for sentence in text.split("|")]
            for emotion, text in SENTENCES.items()}


def sentences_of(sentences, split, fold):
    """The sentences that a split may draw: no two splits share one, and five folds test each of them once."""
    part = [(index - fold) % 5 for index in range(len(sentences))]
    return [s for s, p in zip(sentences, part) if p == {"test": 0, "validation": 1}.get(split, p if p > 1 else -1)]


def draw_sentence(row, bank, cfg):
    """The simulated sentence of one clip (a row of `clips`); depends on name, split, fold and seed alone."""
    choices = sentences_of(bank[row.emotion], row.split, int(cfg.folds))
    return random.Random(f"{cfg.seed}/{row.clip}").choice(choices)


class PlainUnpickler(pickle.Unpickler):
    """Reads builtin containers, strings and numbers; whatever would import something is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def read_cache(path):
    """The dict in a transcript cache, {} when there is none. Raises UserError when it is not such a cache."""
    try:
        cache = PlainUnpickler(io.BytesIO(path.read_bytes())).load() if path.exists() else {}
        if not isinstance(cache, dict):
            raise pickle.UnpicklingError("it holds no dict")
        return cache
    except Exception as error:  # a broken pickle raises almost anything
        raise UserError(f"{path} is not a transcript cache ({error}): delete it, or name another --output-dir") from error


def write_cache(path, cache):
    """Write a transcript cache of builtin containers."""
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(cache))


def add_transcripts(clips, cfg, device):
    """Add the column `transcript`, simulated or by Whisper, from the cache in OUTPUT_DIR where it holds them."""
    if not cfg.use_simulated_sentences:
        return clips.assign(transcript=transcribe(clips, cfg, device))
    bank, path = sentence_bank(), Path(cfg.output_dir) / "ravdess_transcripts_simulated.pkl"
    cache, key = read_cache(path), f"{cfg.split} fold {cfg.folds} seed {cfg.seed} bank {digest(bank)}"
    drawn = {row.clip: draw_sentence(row, bank, cfg) for row in clips.itertuples()}
    if cache.get(key) != drawn:
        write_cache(path, cache | {key: drawn})
    return clips.assign(transcript=clips["clip"].map(drawn))


def load_whisper(cfg, device):
    """The Whisper model of --whisper-model (a name, downloaded once, or a checkpoint file). Raises UserError."""
    try:
        import whisper
    except ImportError as error:
        raise UserError(f"Whisper cannot be imported ({error}): pip install openai-whisper, or leave out "
                        "--no-use-simulated-sentences") from error
    try:
        return whisper, whisper.load_model(cfg.whisper_model, device="cuda" if device == "cuda" else "cpu")
    except Exception as error:  # not found, no network, or a file that is something else
        raise UserError(f"--whisper-model {cfg.whisper_model} cannot be loaded ({type(error).__name__}: {error}): "
                        "name a Whisper checkpoint, or leave out --no-use-simulated-sentences") from error


def transcribe(clips, cfg, device):
    """Whisper's English transcripts (greedy, first 30 s of a clip), cached clip by clip under a key of the audio."""
    source = Path(cfg.whisper_model)
    model_key = digest(source.read_bytes()) if source.is_file() else cfg.whisper_model
    path = Path(cfg.output_dir) / f"ravdess_transcripts_whisper_{source.stem}.pkl"
    cache = read_cache(path)
    texts = cache.setdefault(model_key, {})
    todo = clips[~clips["digest"].isin(texts)]
    if len(todo):
        whisper, model = load_whisper(cfg, device)
        options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=model.device.type == "cuda")
        size = 16 if model.device.type == "cuda" else 4
        for start in tqdm(range(0, len(todo), size), "Transcribing"):
            rows = todo.iloc[start:start + size]
            waves = (whisper.pad_or_trim(load_audio(file, 16000)) for file in rows["path"])
            mels = torch.stack([whisper.log_mel_spectrogram(wave, model.dims.n_mels) for wave in waves])
            results = model.decode(mels.to(model.device), options)
            texts.update(zip(rows["digest"], (result.text.strip() for result in results)))
            write_cache(path, cache)
    return clips["digest"].map(texts)


# %% 8. Audio features
class AudioError(ValueError):
    """Why a recording cannot be used."""


def load_audio(path, rate):
    """A recording as mono float32 samples (n,) at `rate` Hz. Raises AudioError with the reason it cannot be used."""
    try:
        with soundfile.SoundFile(path) as file:
            samples, own_rate, expected = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(f"it cannot be read as audio ({str(error).split(': ')[-1].strip()})") from error
    if not len(samples):
        raise AudioError("it holds no samples")
    if len(samples) < expected or declared_bytes(path) > Path(path).stat().st_size:
        raise AudioError("it is cut off: fewer samples than its header says")
    samples = samples.mean(axis=1)  # (n, channels) -> (n,)
    if not np.isfinite(samples).all():
        raise AudioError("it holds NaN or infinite samples")
    if np.abs(samples).max() < 1e-4:
        raise AudioError("it is silent")
    return soxr.resample(samples, own_rate, rate) if own_rate != rate else samples


def declared_bytes(path):
    """The size of a WAV file as its header has it; 0 where it says nothing (libsndfile mends it without a word)."""
    with open(path, "rb") as file:
        head = file.read(12)
    size = int.from_bytes(head[4:8], "little")
    return size + 8 if head[:4] == b"RIFF" and head[8:] == b"WAVE" and 0 < size < 2**32 - 64 else 0


def trim_silence(samples, cfg):
    """Cut what lies TRIM_DB below the clip's own peak at both ends, but for 50 ms before and 100 ms after."""
    level = np.abs(samples)
    loud = np.flatnonzero(level >= level.max() * 10 ** (-cfg.trim_db / 20))
    return samples[max(0, loud[0] - cfg.sampling_rate // 20):loud[-1] + cfg.sampling_rate // 10]


def speeds(cfg):
    """The resampling factors of SPEEDS, sorted, 1.0 among them. Raises ValueError."""
    values = sorted({1.0, *map(float, names_in(cfg.speeds))})
    if not all(0.5 <= value <= 2 for value in values):
        raise ValueError
    return values


def load_torchaudio():
    """torchaudio, or a UserError with the line that repairs an installation that does not load."""
    try:
        import torchaudio.functional
        return torchaudio
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"torchaudio does not load beside torch {torch.__version__} ({str(error).splitlines()[0][:120]}): "
                        'pip install "torch>=2.6,<2.12" "torchaudio>=2.6,<2.12"') from error


@functools.lru_cache(maxsize=8)
def mel_filters(rate, n_fft, n_mels, factors):
    """Mel filter banks (F, K * M), one per resampling factor.

    Playing a clip s times as fast moves what is at f Hz to s * f Hz, so a bank that takes bin f for s * f shows the
    faster voice from the same spectrum (Jaitly and Hinton 2013 warp the vocal tract alike, bit by bit).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # slowed copies have empty bands at the top
        banks = [load_torchaudio().functional.melscale_fbanks(n_fft // 2 + 1, 50.0, rate / 2, n_mels, round(rate * s))
                 for s in factors]
    return torch.cat(banks, dim=1)


def log_mel(samples, cfg, factors=(1.0,)):
    """Natural log of (mel power + 1e-6): float16 array (T, K, M), K resampling factors, T frames of HOP_LENGTH."""
    x = torch.from_numpy(np.ascontiguousarray(samples))
    x = F.pad(x, (cfg.n_fft // 2, cfg.n_fft // 2 + max(0, cfg.hop_length - len(x))))
    frames = x.unfold(0, cfg.n_fft, cfg.hop_length) * torch.hann_window(cfg.n_fft)  # (T, N_FFT)
    power = torch.fft.rfft(frames).abs().square()  # (T, F)
    bank = mel_filters(cfg.sampling_rate, cfg.n_fft, cfg.n_mels, tuple(factors))
    return (power @ bank + 1e-6).log().clamp(-60000, 60000).half().view(len(power), len(factors), -1).numpy()


def prepare_clip(path, cfg):
    """Read, downmix, resample, trim and transform one clip: (T, K, M), or the reason why not."""
    try:
        return log_mel(trim_silence(load_audio(path, cfg.sampling_rate), cfg), cfg, speeds(cfg))
    except AudioError as error:
        return str(error)


def add_features(clips, audit, cfg):
    """Add the column `mel`: float16 (T, K, M) views of one memory-mapped cache; unusable clips leave, with reasons.

    The cache's name is a key of every clip's bytes and every setting that shapes the features.
    """
    load_torchaudio()
    folder = Path(cfg.output_dir) / "cache"
    key = digest(list(clips["digest"]), {name: getattr(cfg, name) for name in FEATURES})
    data, index = folder / f"log_mel_{key}.npy", folder / f"log_mel_{key}.json"
    if not (data.exists() and index.exists()):
        prepared = in_parallel(lambda path: prepare_clip(path, cfg), clips["path"], "Log-mel spectrograms")
        usable = [mel for mel in prepared if not isinstance(mel, str)]
        if not usable:
            raise UserError(f"no clip under {audit['folder']} can be used ({prepared[0]}): see --ravdess-path")
        for old in folder.glob("log_mel_*"):
            old.unlink()
        with replacing(data) as temporary:
            np.save(temporary, np.concatenate(usable))
        write_json(index, [mel if isinstance(mel, str) else len(mel) for mel in prepared])
    entries, frames = read_output(index, lambda p: json.loads(p.read_text())), read_output(data, mapped)
    ends = np.cumsum([0 if isinstance(entry, str) else entry for entry in entries])
    bad = [isinstance(entry, str) for entry in entries]
    audit["left_out"].update((path, entry) for path, entry in zip(clips["path"], entries) if isinstance(entry, str))
    mels = [None if isinstance(n, str) else frames[end - n:end] for n, end in zip(entries, ends)]
    return clips.assign(mel=mels)[~np.array(bad)].reset_index(drop=True)


def mapped(path):
    """A .npy file as a memory-mapped array."""
    return np.load(path, mmap_mode="r")


# %% 9. Text features
def words_in(text):
    """Lower-case words; an empty transcript is one unknown word."""
    return re.findall(r"[a-z0-9']+", text.lower()) or ["<unk>"]


def build_vocabulary(texts):
    """Words of the training transcripts, sorted; ids 0 and 1 are padding and unknown."""
    return ["<pad>", "<unk>", *sorted({word for text in texts for word in words_in(text)} - {"<unk>"})]


@functools.lru_cache(maxsize=2)
def load_text_encoder(name):
    """A pretrained DistilBERT-like encoder: (configuration, tokenizer JSON, module). Raises UserError."""
    import transformers
    advice = "name a folder with --bert-model FOLDER, or go without: --run-models cnn,rnn,fusion_rnn"
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")) + list(Path(name).glob("*.bin")):
        raise UserError(f"--bert-model {name} holds no weights (model.safetensors): {advice}")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer.to_str()
        module, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # the hub's clients raise many kinds
        raise UserError(f"--bert-model {name} cannot be loaded ({str(error).strip().splitlines()[0][:150]}): {advice}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(f"--bert-model {name} lacks the weights of {missing[0]} and {len(missing) - 1} more: {advice}")
    return json.loads(module.config.to_json_string(use_diff=False)), tokenizer, module.float()


# %% 10. Batches
def make_dataset(model, clips, cfg, device, augment=False, mixup=0.0):
    """The dataset of what a model reads (`model.inputs`): sound, words, or both."""
    parts = []
    if "mel" in model.inputs:
        parts.append(AudioDataset(clips, cfg, device, augment, mixup))
    if model.inputs != ("mel",):
        parts.append(TextDataset(clips, model, cfg, device, augment))
    return parts[0] if len(parts) == 1 else FusionDataset(*parts)


class ClipDataset(Dataset):
    """Labels of clips; a subclass adds what its models read. A list of rows gives one batch, on the device."""

    def __init__(self, clips, device):
        self.device = device
        self.labels = torch.tensor([EMOTIONS.index(emotion) for emotion in clips["emotion"]])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.__getitems__([row])

    def __getitems__(self, rows):
        return {"label": self.labels[rows].to(self.device)}


class TextDataset(ClipDataset):
    """Token ids (B, L); with `augment` each word is hidden with probability WORD_DROPOUT."""

    def __init__(self, clips, model, cfg, device, augment):
        super().__init__(clips, device)
        self.tensors, self.augment, self.p = model.tokenize(list(clips["transcript"])), augment, cfg.word_dropout
        self.ids, self.hidden, self.special = next(iter(self.tensors)), model.hidden_id, torch.tensor(model.special_ids)

    def __getitems__(self, rows):
        batch = {key: tensor[rows] for key, tensor in self.tensors.items()}
        if self.augment:
            ids = batch[self.ids]
            hide = (torch.rand(ids.shape) < self.p) & ~torch.isin(ids, self.special)
            batch[self.ids] = ids.masked_fill(hide, self.hidden)
        return {key: tensor.to(self.device) for key, tensor in batch.items()} | super().__getitems__(rows)


class AudioDataset(ClipDataset):
    """Log-mel windows (B, 1, M, T): the middle of each clip, or with `augment` a random view of it."""

    def __init__(self, clips, cfg, device, augment, mixup):
        super().__init__(clips, device)
        self.mels, self.cfg, self.augment, self.mixup = list(clips["mel"]), cfg, augment, mixup
        self.frames = round(cfg.clip_seconds * cfg.sampling_rate / cfg.hop_length)
        self.factors = torch.tensor(speeds(cfg))
        self.traits = torch.tensor(np.stack([clips["intensity"] == 2, clips["statement"] == 2, clips["sex"] == "male"], 1),
                                   dtype=torch.float32)  # (N, 3)

    def __getitems__(self, rows):
        batch = super().__getitems__(rows) | {"traits": self.traits[rows].to(self.device)}
        if not self.augment:
            copy = int((self.factors == 1).nonzero()[0])
            starts = [(len(self.mels[row]) - self.frames) // 2 for row in rows]
            return batch | {"mel": self.cut(rows, [copy] * len(rows), starts, self.frames)}
        batch["mel"] = disturb(self.random_views(rows))
        return mix(batch, self.mixup) if self.mixup else batch

    def cut(self, rows, copies, starts, frames):
        """Frames from `starts` on: (B, 1, M, frames); beyond a clip's ends its outermost frames repeat."""
        windows = [self.mels[row][np.clip(np.arange(start, start + frames), 0, len(self.mels[row]) - 1), copy]
                   for row, copy, start in zip(rows, copies, starts)]
        return torch.from_numpy(np.stack(windows)).to(self.device).float().transpose(1, 2)[:, None]

    def random_views(self, rows):
        """Windows at a random position, speed, stretch (up to 16 %) and warp of the mel axis: (B, 1, M, T)."""
        n, frames = len(rows), self.frames
        copies = torch.randint(len(self.factors), (n,))
        step = self.factors[copies] * torch.exp(spread(n, 0.15))  # source frames per frame of the window
        slack = torch.tensor([float(len(self.mels[row])) for row in rows]) - frames * step
        starts = torch.rand(n) * slack  # of the view in the clip, or of the clip in the view
        source = math.ceil(frames * float(step.max())) + 2
        mel = self.cut(rows, copies.tolist(), starts.floor().int().tolist(), source)
        theta = torch.zeros(n, 2, 3)  # affine map from window to source, both spanning -1 to 1
        theta[:, 0, 0] = step * (frames - 1) / (source - 1)
        theta[:, 0, 2] = theta[:, 0, 0] + 2 * (starts - starts.floor()) / (source - 1) - 1
        theta[:, 1, 1], theta[:, 1, 2] = torch.exp(spread(n, 0.08)), spread(n, 0.06)
        grid = F.affine_grid(theta, [n, 1, mel.shape[2], frames], align_corners=True).to(self.device)
        return F.grid_sample(mel, grid, padding_mode="border", align_corners=True)


class FusionDataset(Dataset):
    """Sound and words of the same clips in one batch."""

    def __init__(self, *parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts[0])

    def __getitems__(self, rows):
        return {key: value for part in self.parts for key, value in part.__getitems__(rows).items()}


def spread(n, limit, device="cpu"):
    """n numbers drawn evenly between -limit and limit."""
    return (torch.rand(n, device=device) * 2 - 1) * limit


def disturb(mel):
    """Another room and microphone (tilt and ripple, up to 3 dB each), then hide two bands and two stretches of time."""
    n, (bands, frames), device = len(mel), mel.shape[2:], mel.device
    axis = torch.linspace(-1, 1, bands, device=device)[None]  # (1, M)
    draw = functools.partial(spread, (n, 1), device=device)
    ripple = torch.cos(math.pi * (axis * (1 + draw(0.75)) + draw(1)))
    colour = (draw(3) * axis + draw(3) * ripple) * math.log(10) / 10  # dB of power -> natural log
    mel = mel + colour[:, None, :, None]
    mel = mel - mel.mean(dim=(2, 3), keepdim=True)  # so that hidden means average
    mask = load_torchaudio().functional.mask_along_axis_iid
    for _ in range(2):
        mel = mask(mask(mel, max(1, bands * 10 // 64), 0.0, 2), max(1, frames // 10), 0.0, 3)
    return mel


def mix(batch, strength):
    """Mixup (Zhang et al. 2018): add a random partner to every clip, one Beta-distributed weight a batch."""
    weight = float(torch.distributions.Beta(strength, strength).sample())
    order = torch.randperm(len(batch["label"]), device=batch["label"].device)
    batch["label"] = F.one_hot(batch["label"], len(EMOTIONS)).float()  # (B,) -> (B, C)
    return {key: weight * value + (1 - weight) * value[order] for key, value in batch.items()}


# %% 11. AudioCNN
class Encoder(nn.Module):
    """What the three unimodal models share: a sequence, pooled to features, classified by a linear head.

    A subclass sets `inputs` (the batch keys it reads) and `head`, and defines `sequence(batch)` and
    `pool(sequence, mask)`. `spec` holds the constructor's arguments as builtins, for the checkpoint.
    """

    inputs = ()

    def __init__(self, **spec):
        super().__init__()
        self.spec = spec
        self.dropout = nn.Dropout(spec["dropout"])

    def features(self, batch):
        """One vector a clip, (B, D)."""
        return self.pool(*self.sequence(batch))

    def forward(self, batch):
        """Logits (B, C); leaves the features in the batch for auxiliary losses."""
        batch["features"] = self.dropout(self.features(batch))
        return self.head(batch["features"])

    def auxiliary_loss(self, batch):
        """Further training loss; 0 unless a model defines it."""
        return 0.0


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016), with squeeze-excitation (Hu et al. 2018) if asked."""

    def __init__(self, inputs, outputs, stride, squeeze=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs // 8, 1), nn.ReLU(),
            nn.Conv2d(outputs // 8, outputs, 1), nn.Sigmoid()) if squeeze else None

    def forward(self, x):
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = self.body(x)
        return F.relu((y if self.gate is None else y * self.gate(y)) + self.shortcut(x))


class AudioCNN(Encoder):
    """A 2-D CNN on log-mel windows that keeps four frequency bands apart, a GRU over time, attentive statistics.

    Each window is standardised by itself, so that loudness and microphone say nothing. In training, linear heads
    also tell intensity, statement and sex, which keeps the features from memorising speakers.
    """

    inputs = ("mel",)

    def __init__(self, classes, dropout):
        super().__init__(classes=classes, dropout=dropout)
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            ResidualBlock(32, 64, 2), ResidualBlock(64, 128, 2), ResidualBlock(128, 128, (2, 1), squeeze=True))
        self.project = nn.Sequential(nn.Conv1d(4 * 128, 128, 1, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.recurrent = nn.GRU(128, 64, batch_first=True, bidirectional=True)
        self.attention = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
        self.head = nn.Linear(256, classes)
        self.trait_heads = nn.Linear(256, 3)

    def sequence(self, batch):
        """mel (B, 1, M, T) -> steps (B, S, 128), S = T / 8, and their mask (B, S), all true."""
        mel = batch["mel"]
        deviation, mean = torch.std_mean(mel, dim=(2, 3), keepdim=True)
        x = self.convolutions((mel - mean) / (deviation + 1e-5))  # (B, 1, M, T) -> (B, 128, M / 16, S)
        x = F.adaptive_avg_pool2d(x, (4, x.shape[3])).flatten(1, 2)  # (B, 4 * 128, S)
        x = self.project(x).transpose(1, 2)  # (B, S, 128)
        return x + self.recurrent(x)[0], torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def pool(self, steps, mask):
        """Attentive mean and standard deviation over time (Okabe et al. 2018): (B, S, 128) -> (B, 256)."""
        weight = self.attention(steps).masked_fill(~mask[..., None], -math.inf).softmax(dim=1)  # (B, S, 1)
        mean = (weight * steps).sum(dim=1)
        variance = (weight * (steps - mean[:, None]) ** 2).sum(dim=1)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)

    def auxiliary_loss(self, batch):
        """How badly the features tell intensity, statement and sex (`traits` (B, 3), 0 to 1)."""
        if "traits" not in batch:
            return 0.0
        return 0.6 * F.binary_cross_entropy_with_logits(self.trait_heads(batch["features"]), batch["traits"])


# %% 12. TextRNN, TextBERT
def masked_mean(steps, mask):
    """Mean over the steps (B, S, D) whose mask (B, S) is true: (B, D)."""
    mask = mask[..., None].to(steps.dtype)
    return (steps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class TextRNN(Encoder):
    """Word embeddings, a bidirectional LSTM, mean and maximum over the words."""

    inputs = ("tokens",)
    hidden_id, special_ids = 1, [0]

    def __init__(self, classes, dropout, vocabulary, max_tokens):
        super().__init__(classes=classes, dropout=dropout, vocabulary=vocabulary, max_tokens=max_tokens)
        self.ids = {word: index for index, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary), 100, padding_idx=0)
        self.recurrent = nn.LSTM(100, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, classes)

    def tokenize(self, texts):
        """Texts -> {"tokens": (N, L)}, padded with 0 to the longest."""
        rows = [[self.ids.get(word, 1) for word in words_in(text)][:self.spec["max_tokens"]] for text in texts]
        return {"tokens": nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)}

    def sequence(self, batch):
        """tokens (B, L) -> steps (B, L, 128), and the mask of real words (B, L); padding is never read."""
        mask = batch["tokens"] != 0
        embedded = self.dropout(self.embedding(batch["tokens"]))
        packed = nn.utils.rnn.pack_padded_sequence(embedded, mask.sum(dim=1).cpu(), True, enforce_sorted=False)
        steps, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], True, total_length=mask.shape[1])
        return steps, mask

    def pool(self, steps, mask):
        """(B, L, 128) -> (B, 256)."""
        return torch.cat([masked_mean(steps, mask), steps.masked_fill(~mask[..., None], -math.inf).amax(dim=1)], dim=1)


class TextBERT(Encoder):
    """A pretrained DistilBERT-like encoder, fine-tuned whole, mean-pooled over its tokens."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, classes, dropout, config, tokenizer, max_tokens):
        super().__init__(classes=classes, dropout=dropout, config=config, tokenizer=tokenizer, max_tokens=max_tokens)
        import tokenizers
        import transformers
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding()
        self.special_ids = [self.tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
        self.hidden_id = self.tokenizer.token_to_id("[MASK]")
        config = dict(config)
        self.encoder = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)).float()
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def tokenize(self, texts):
        """Texts -> {"input_ids": (N, L), "attention_mask": (N, L)}."""
        encoded = self.tokenizer.encode_batch(texts)
        return {"input_ids": torch.tensor([e.ids for e in encoded]),
                "attention_mask": torch.tensor([e.attention_mask for e in encoded])}

    def sequence(self, batch):
        """input_ids, attention_mask (B, L) -> steps (B, L, D), and the mask as booleans (B, L)."""
        steps = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return steps, batch["attention_mask"].bool()

    def pool(self, steps, mask):
        """(B, L, D) -> (B, D)."""
        return masked_mean(steps, mask)


# %% 13. Fusion
class EarlyFusion(nn.Module):
    """A classification head on the joined features of frozen, trained unimodal models.

    `parts` maps their short names to their specs. Their features of training clips are memorised, so the head is
    fitted on features of disturbed sound and words.
    """

    def __init__(self, classes, dropout, parts):
        super().__init__()
        self.spec = dict(classes=classes, dropout=dropout, parts=parts)
        self.encoders = nn.ModuleDict({name: MODELS[name].kind(**spec) for name, spec in parts.items()})
        self.inputs = tuple(key for encoder in self.encoders.values() for key in encoder.inputs)
        self.text = next(encoder for encoder in self.encoders.values() if "mel" not in encoder.inputs)
        self.tokenize, self.special_ids, self.hidden_id = self.text.tokenize, self.text.special_ids, self.text.hidden_id
        self.norms = nn.ModuleList(nn.LayerNorm(e.head.in_features) for e in self.encoders.values())
        width = sum(encoder.head.in_features for encoder in self.encoders.values())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 128), nn.ReLU(), nn.Dropout(dropout),
                                  nn.Linear(128, classes))
        self.encoders.requires_grad_(False)

    def train(self, mode=True):
        """Training mode for the head alone: the encoders stay as they were trained."""
        super().train(mode)
        self.encoders.eval()
        return self

    def features(self, batch):
        """Both models' features, each normalised, joined: (B, D)."""
        with torch.no_grad():
            parts = [encoder.features(batch) for encoder in self.encoders.values()]
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts)], dim=1)

    def forward(self, batch):
        """Logits (B, C)."""
        return self.head(self.features(batch))

    def auxiliary_loss(self, batch):
        """None."""
        return 0.0


# %% 14. Training, prediction, scores, checkpoints
class ModelRow(NamedTuple):
    """A trained model's class, file stem, title, suffix of its constants, and the models it is made of."""

    kind: type
    stem: str
    title: str
    suffix: str
    parts: tuple = ()


MODELS = {
    "cnn": ModelRow(AudioCNN, "AudioCNN", "AudioCNN", "cnn"),
    "rnn": ModelRow(TextRNN, "TextRNN", "TextRNN", "rnn"),
    "bert": ModelRow(TextBERT, "TextBERT", "TextBERT", "bert"),
    "fusion_rnn": ModelRow(EarlyFusion, "EarlyFusion_RNN", "Early fusion CNN + RNN", "fusion", ("cnn", "rnn")),
    "fusion_bert": ModelRow(EarlyFusion, "EarlyFusion_BERT", "Early fusion CNN + BERT", "fusion", ("cnn", "bert")),
}
LATE = {  # arithmetic on saved predictions, no model
    "late_rnn": ModelRow(None, "LateFusion_RNN", "Late fusion CNN + RNN", "", ("cnn", "rnn")),
    "late_bert": ModelRow(None, "LateFusion_BERT", "Late fusion CNN + BERT", "", ("cnn", "bert")),
}
ROWS = MODELS | LATE


def pick_device(cfg):
    """The torch device type of --device: cuda, mps or cpu. Raises UserError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name, usable in there.items() if usable) if cfg.device == "auto" else cfg.device
    if not there[device]:
        raise UserError(f"--device {device} is not available here: leave it out or use --device cpu")
    return device


def training_precision(device):
    """The lower precision that this device gains from in training, or float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = [getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return torch.bfloat16 if device == "cpu" and any(fast) else torch.float32


def build_model(name, clips, cfg, device):
    """A model ready for training: seeded, with its vocabulary, pretrained encoder or trained parts."""
    torch.manual_seed(cfg.seed)
    row, common = MODELS[name], {"classes": len(EMOTIONS), "dropout": settings_for(cfg, name)["dropout"]}
    if name == "bert":
        config, tokenizer, pretrained = load_text_encoder(cfg.bert_model)
        model = TextBERT(**common, config=config, tokenizer=tokenizer, max_tokens=cfg.max_tokens)
        model.encoder.load_state_dict(pretrained.state_dict())
    elif name == "rnn":
        vocabulary = build_vocabulary(clips.loc[clips["split"] == "train", "transcript"])
        model = TextRNN(**common, vocabulary=vocabulary, max_tokens=cfg.max_tokens)
    elif row.parts:
        parts = {part: restore_model(checkpoint_path(cfg, part)) for part in row.parts}
        model = EarlyFusion(**common, parts={part: trained.spec for part, trained in parts.items()})
        for part, trained in parts.items():
            model.encoders[part].load_state_dict(trained.state_dict())
    else:
        model = row.kind(**common)
    return model.to(device)


def make_optimizer(model, settings):
    """AdamW on what is trained; weight decay on matrices only, not on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in trained if p.ndim > 1]},
                              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}],
                             lr=settings["learning_rate"], weight_decay=settings["weight_decay"])


class Trainer:
    """One optimiser step after another; `average` is the moving average of the weights, the model in the end."""

    def __init__(self, model, settings, steps, weights, device):
        self.model, self.device, self.precision = model, device, training_precision(device)
        self.optimizer = make_optimizer(model, settings)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, settings["learning_rate"], steps, pct_start=0.15)
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == torch.float16)
        self.loss = nn.CrossEntropyLoss(weights, label_smoothing=settings["label_smoothing"])

        def move(average, current, count):  # faster at first, so that short trainings forget their start
            return average + (current - average) * (1 - min(settings["ema_decay"], (1 + count) / (10 + count)))
        self.average = AveragedModel(model, avg_fn=move, use_buffers=True)

    def step(self, batch):
        """Train on one batch; returns (loss, share of clips whose strongest target was found)."""
        with torch.autocast(self.device, self.precision, enabled=self.precision != torch.float32):
            logits = self.model(batch)
            loss = self.loss(logits.float(), batch["label"]) + self.model.auxiliary_loss(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.average.update_parameters(self.model)
        label = batch["label"] if batch["label"].ndim == 1 else batch["label"].argmax(dim=1)
        return float(loss.detach()), float((logits.argmax(dim=1) == label).float().mean())


def batches_of(dataset, size, shuffle=False):
    """A loader whose batches the dataset makes itself."""
    return DataLoader(dataset, size, shuffle=shuffle, collate_fn=lambda batch: batch)


def class_weights(labels):
    """Weights (C,) by rarity, with mean 1 over the clips."""
    counts = torch.bincount(labels, minlength=len(EMOTIONS)).clamp(min=1)
    return counts.sum() / (counts * len(EMOTIONS))


def fit(model, train, validation, settings, device):
    """Train for the full schedule; returns the averaged model and the history, a DataFrame with a row per epoch."""
    loader = batches_of(train, settings["batch_size"], shuffle=True)
    weights = class_weights(labels_of(train)).to(device) if settings["class_weights"] else None
    trainer = Trainer(model, settings, settings["epochs"] * len(loader), weights, device)
    history = []
    print("  epoch  train loss  train acc   val loss    val acc    val UAR  seconds")
    for epoch in range(1, settings["epochs"] + 1):
        start = time.perf_counter()
        model.train()
        steps = [trainer.step(batch) for batch in loader]
        logits, labels = predict(trainer.average.module, validation), labels_of(validation)
        probabilities = logits.softmax(dim=1).numpy()
        row = dict(epoch=epoch, train_loss=np.mean([loss for loss, _ in steps]),
                   train_accuracy=np.mean([right for _, right in steps]),
                   validation_loss=float(F.cross_entropy(logits, labels)),
                   validation_accuracy=metrics.accuracy_score(labels, probabilities.argmax(axis=1)),
                   validation_uar=recall(labels, probabilities.argmax(axis=1)), seconds=time.perf_counter() - start)
        if not math.isfinite(row["train_loss"]):
            raise UserError(f"the training loss is {row['train_loss']} in epoch {epoch}: lower --learning-rate")
        print("  {epoch:5d} {train_loss:11.3f} {train_accuracy:10.1%} {validation_loss:10.3f} {validation_accuracy:10.1%} "
              "{validation_uar:10.1%} {seconds:8.1f}".format(**row), flush=True)
        history.append(row)
    return trainer.average.module, pd.DataFrame(history)


def labels_of(dataset):
    """Label indices (N,) of a dataset, on the CPU."""
    return dataset.labels if isinstance(dataset, ClipDataset) else dataset.parts[0].labels


@torch.inference_mode()
def predict(model, dataset):
    """Logits (N, C) in float32 on the CPU, in the dataset's order."""
    model.eval()
    return torch.cat([model(batch).float().cpu() for batch in batches_of(dataset, 64)])


def fit_temperature(logits, labels):
    """The temperature that minimises the NLL of softmax(logits / temperature) (Guo et al. 2017)."""
    found = minimize_scalar(lambda t: float(F.cross_entropy(logits / math.exp(t), labels)), bounds=(-2.5, 2.5), method="bounded")
    return math.exp(found.x)


def recall(true, predicted):
    """UAR: the mean of the recalls of the classes that occur in `true`."""
    return float(metrics.recall_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0))


def calibration_error(probabilities, true, bins=15):
    """ECE: mean distance of confidence and accuracy over equal bins of confidence, weighted by size."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(sum(abs(confidence[which == b].sum() - right[which == b].sum()) for b in range(bins)) / len(true))


def score(probabilities, true):
    """Every figure of every table from probabilities (N, C) and label indices (N,): a dict of builtins, shares 0 to 1."""
    probabilities = np.clip(probabilities, 1e-7, 1)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    predicted, labels = probabilities.argmax(axis=1), list(range(len(EMOTIONS)))
    report = metrics.classification_report(true, predicted, labels=labels, target_names=EMOTIONS, output_dict=True,
                                           zero_division=0)
    return {
        "clips": len(true), "accuracy": float(metrics.accuracy_score(true, predicted)), "uar": recall(true, predicted),
        "macro_f1": float(metrics.f1_score(true, predicted, average="macro", labels=np.unique(true), zero_division=0)),
        "nll": float(metrics.log_loss(true, probabilities, labels=labels)),
        "ece": calibration_error(probabilities, np.asarray(true)),
        "per_class": {emotion: {key: float(value) for key, value in report[emotion].items()} for emotion in EMOTIONS},
        "confusion": metrics.confusion_matrix(true, predicted, labels=labels).tolist(),
    }


def predictions_table(clips, probabilities):
    """Who said what and what was heard: a row per clip with its split, actor, true and predicted emotion, probabilities."""
    table = clips[["split", "clip", "actor", "emotion"]].rename(columns={"emotion": "true"}).reset_index(drop=True)
    table["predicted"] = [EMOTIONS[index] for index in probabilities.argmax(axis=1)]
    return pd.concat([table, pd.DataFrame(probabilities, columns=EMOTIONS)], axis=1)


def checkpoint_path(cfg, name):
    """Where a model's checkpoint lies."""
    return Path(cfg.output_dir) / f"{MODELS[name].stem}_best.pth"


def read_checkpoint(path):
    """The contents of a checkpoint (tensors stay on disk until used). Raises UserError when it is not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"model", "spec", "weights", "classes", "fingerprint", "scores"} <= set(checkpoint):
            raise ValueError("it lacks what this script writes")
        return checkpoint
    except Exception as error:  # truncated, foreign or hostile files raise many kinds
        raise UserError(f"{path} is not a usable checkpoint ({type(error).__name__}): train it again with "
                        "--phase unimodal or fusion, or name another --output-dir") from error


def restore_model(path):
    """The model of a checkpoint, on the CPU, in evaluation mode."""
    checkpoint = read_checkpoint(path)
    model = MODELS[checkpoint["model"]].kind(**checkpoint["spec"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval()


def fingerprint(cfg, name, clips=None):
    """What a checkpoint depends on, as a flat dict: settings, and with `clips` the data; parts included."""
    row = MODELS[name]
    mark = {key: str(value) for key, value in settings_for(cfg, name).items()}
    keys = ["seed", "split", "folds"] + (FEATURES + ["mixup"] if name == "cnn" else [])
    keys += ["max_tokens", "word_dropout", "use_simulated_sentences"] if name in ("rnn", "bert") else []
    keys += ["bert_model"] if name == "bert" else []
    mark |= {key: str(getattr(cfg, key)) for key in keys}
    for part in row.parts:
        mark |= {f"{part} {key}": value for key, value in fingerprint(cfg, part, clips).items()}
    if clips is not None and not row.parts:
        columns = ["clip", "digest", "emotion", "split"] + (["transcript"] if name != "cnn" else [])
        mark["data"] = digest(clips[columns].to_csv(index=False))
    return mark


def differences(old, new):
    """What changed between two fingerprints, as text; empty when nothing did."""
    changed = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} {old.get(key)} -> {new[key]}" if not key.endswith("data") else f"{key} changed" for key in changed)


def out_of_date(cfg, name, clips):
    """Why a model must be trained: a sentence, or "" when its files can be reused as they are."""
    path, stem = checkpoint_path(cfg, name), MODELS[name].stem
    if not path.exists():
        return "not trained yet"
    if not all(file.exists() for file in (history_path(cfg, stem), predictions_path(cfg, stem))):
        return "its history or predictions are missing"
    try:
        return differences(read_checkpoint(path)["fingerprint"], fingerprint(cfg, name, clips))
    except UserError as error:
        return str(error)


def history_path(cfg, stem):
    """Where a model's training history lies."""
    return Path(cfg.output_dir) / "histories" / f"{stem}.csv"


def predictions_path(cfg, stem):
    """Where a row's predictions lie."""
    return Path(cfg.output_dir) / "predictions" / f"{stem}.csv"


def train_model(name, clips, cfg, device):
    """Train one model and write its history, predictions and checkpoint; the old checkpoint becomes *.previous.pth."""
    row, settings, path = MODELS[name], settings_for(cfg, name), checkpoint_path(cfg, name)
    model = build_model(name, clips, cfg, device)
    parts = {split: clips[clips["split"] == split] for split in SPLITS}
    train = make_dataset(model, parts["train"], cfg, device, augment=True, mixup=cfg.mixup if name == "cnn" else 0.0)
    fixed = {split: make_dataset(model, part, cfg, device) for split, part in parts.items()}
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{row.title}: {size:,} trained parameters, {len(train)} clips, {settings['epochs']} epochs", flush=True)
    model, history = fit(model, train, fixed["validation"], settings, device)
    logits = {split: predict(model, dataset) for split, dataset in fixed.items()}
    temperature = fit_temperature(logits["validation"], labels_of(fixed["validation"]))
    probabilities = {split: (values / temperature).softmax(dim=1).numpy() for split, values in logits.items()}
    table = pd.concat([predictions_table(parts[split], probabilities[split]) for split in SPLITS])
    validation = score(probabilities["validation"], labels_of(fixed["validation"]).numpy())
    write_table(history_path(cfg, row.stem), history)
    write_table(predictions_path(cfg, row.stem), table)
    if path.exists():
        path.replace(path.with_suffix(".previous.pth"))
    with replacing(path) as temporary:
        torch.save({
            "model": name, "spec": model.spec, "weights": model.state_dict(), "classes": EMOTIONS,
            "temperature": temperature, "features": {key: getattr(cfg, key) for key in FEATURES}, "marks": marks(cfg),
            "config": {key.lower(): getattr(cfg, key.lower()) for key in SETTINGS}, "versions": versions(),
            "fingerprint": fingerprint(cfg, name, clips), "scores": validation, "epochs": settings["epochs"]}, temporary)


def versions():
    """The versions of what a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "pandas": pd.__version__, "platform": platform.platform(terse=True)}


# %% 15. Plots
def save_figure(figure, name, cfg):
    """Save a figure under its marks, show it in a notebook, close it."""
    if marks(cfg):
        figure.text(0.995, 0.002, "; ".join(marks(cfg)), ha="right", va="bottom", fontsize=8, color="firebrick")
    path = Path(cfg.output_dir) / "plots" / f"{name}.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    if in_kernel():
        from IPython.display import Image, display
        display(Image(filename=str(path)))
    plt.close(figure)


def plot_samples(clips, cfg):
    """The loudest training clip of one actor per emotion: waveform above, log-mel spectrogram below."""
    figure, axes = plt.subplots(4, 4, figsize=(13, 9), layout="constrained", height_ratios=[1, 2, 1, 2])
    rows = clips[clips["split"] == "train"].sort_values(["actor", "intensity", "clip"], ascending=[True, False, True])
    factor = speeds(cfg).index(1.0)
    for index, emotion in enumerate(EMOTIONS):
        row = rows[rows["emotion"] == emotion].iloc[0]
        wave, spectrogram = axes[index // 4 * 2, index % 4], axes[index // 4 * 2 + 1, index % 4]
        samples = trim_silence(load_audio(row["path"], cfg.sampling_rate), cfg)
        seconds = len(samples) / cfg.sampling_rate
        wave.plot(np.linspace(0, seconds, len(samples)), samples, linewidth=0.4)
        wave.set(title=f"{emotion} (actor {row['actor']})", xlim=(0, seconds), xticks=[])
        spectrogram.imshow(row["mel"][:, factor].astype(float).T, origin="lower", aspect="auto", cmap="magma",
                           extent=(0, seconds, 0, cfg.n_mels))
        spectrogram.set_xlabel("seconds")
    for line in range(4):
        axes[line, 0].set_ylabel("mel band" if line % 2 else "amplitude")
    save_figure(figure, "samples", cfg)


def plot_counts(clips, cfg):
    """Clips per emotion in each split."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    sns.countplot(clips, x="emotion", hue="split", order=EMOTIONS, hue_order=SPLITS, ax=axis)
    for bars in axis.containers:
        axis.bar_label(bars, fontsize=8)
    axis.set(title=f"Clips per emotion: {len(clips)} in all", xlabel="", ylabel="clips")
    axis.legend(title="", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, "class_counts", cfg)


def plot_curves(rows, cfg):
    """Loss and accuracy by epoch of every model that was trained."""
    names = [name for name in MODELS if rows[name]["status"] == "run"]
    figure, axes = plt.subplots(2, len(names), figsize=(max(5, 3.2 * len(names)), 5.6), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        history = read_output(history_path(cfg, MODELS[name].stem), pd.read_csv)
        for axis, kind in zip(axes[:, column], ("loss", "accuracy")):
            axis.plot(history["epoch"], history[f"train_{kind}"], label="training (disturbed, smoothed)")
            axis.plot(history["epoch"], history[f"validation_{kind}"], label="validation")
        axes[0, column].set_title(MODELS[name].title, fontsize=10)
        axes[1, column].set(xlabel="epoch", ylim=(0, 1.02))
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, "training_curves", cfg)


def plot_confusion(name, row, cfg):
    """The test confusion matrix of one row, as counts and as shares of the true emotion."""
    counts = np.array(row["test"]["confusion"])
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axis, values, form, title in ((axes[0], counts, "d", "clips"), (axes[1], shares, ".0f", "percent of the true emotion")):
        sns.heatmap(values, annot=True, fmt=form, cmap="Blues", cbar=False, square=True, ax=axis,
                    xticklabels=EMOTIONS, yticklabels=EMOTIONS)
        axis.set(title=title, xlabel="predicted", ylabel="true")
        axis.tick_params(axis="x", rotation=45)
    figure.suptitle(f"{ROWS[name].title}: test accuracy {row['test']['accuracy']:.1%}, UAR {row['test']['uar']:.1%}")
    save_figure(figure, f"confusion_{ROWS[name].stem}", cfg)


def plot_comparison(rows, cfg):
    """UAR of all rows on validation and test, chance drawn in."""
    table = pd.DataFrame([{"row": ROWS[name].title, "split": split, "UAR": 100 * row[split]["uar"]}
                          for name, row in rows.items() for split in ("validation", "test") if row["status"] == "run"])
    figure, axis = plt.subplots(figsize=(9, 4.8), layout="constrained")
    sns.barplot(table, y="row", x="UAR", hue="split", ax=axis, palette=["lightsteelblue", "steelblue"])
    for bars in axis.containers:
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.axvline(100 / len(EMOTIONS), color="firebrick", linestyle="--", label="chance")
    axis.set(xlim=(0, 108), xlabel="UAR in percent", ylabel="", title="Seven ways to tell eight emotions apart")
    axis.legend(title="", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, "comparison", cfg)


# %% 16. Report
MEANING = (
    "UAR is the mean of the eight recalls; guessing gives 12.5 percent. Speakers of the test split were never heard in "
    "training, unless this page says that speakers are shared.",
    "One fold tests five actors, and figures move by ten points and more from one set of actors to another: compare "
    "systems over all five folds, never on one.",
    "Temperatures are fitted on the validation split, so its NLL and ECE are slightly flattering; the test split was "
    "scored once, by the final models.",
    "Simulated sentences are drawn by label. Rows that read them show how text and fusion work, not how well words "
    "tell feelings: RAVDESS's own two sentences are the same in every emotion and carry none.",
    "RAVDESS holds acted speech of 24 North American speakers. Nothing here measures what a person feels, and nothing "
    "here is fit for judging people.",
)


def result_table(rows):
    """The figures of all rows as strings: a DataFrame, one line per row, what did not run with its reason."""
    lines = []
    for name, row in rows.items():
        line = {"model": ROWS[name].title}
        if row["status"] == "run":
            line |= {f"{split} acc": f"{row[split]['accuracy']:.1%}" for split in SPLITS}
            line |= {"val UAR": f"{row['validation']['uar']:.1%}", "test UAR": f"{row['test']['uar']:.1%}",
                     "test F1": f"{row['test']['macro_f1']:.1%}", "test NLL": f"{row['test']['nll']:.3f}",
                     "test ECE": f"{row['test']['ece']:.3f}"}
        lines.append(line | {"note": "" if row["status"] == "run" else row["status"]})
    table = pd.DataFrame(lines).fillna("-").rename(columns={"validation acc": "val acc"})
    return table if table["note"].any() else table.drop(columns="note")


def add_table(document, table):
    """Append a DataFrame to a docx document as a table of small print."""
    from docx.shared import Pt
    grid = document.add_table(1, len(table.columns), "Light Grid Accent 1")
    for values in [table.columns, *table.itertuples(index=False)]:
        cells = grid.rows[0].cells if values is table.columns else grid.add_row().cells
        for cell, value in zip(cells, values):
            cell.text = re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd]", "?", str(value))  # XML allows no control characters
            for run in cell.paragraphs[0].runs:
                run.font.size = Pt(8)


def write_report(figures, audit, config, cfg):
    """Write the report as .docx from what the other stages left; needs no model."""
    import docx
    from docx.shared import Cm
    rows, document = figures["rows"], docx.Document()
    document.sections[0].left_margin = document.sections[0].right_margin = Cm(2)
    document.sections[0].header.paragraphs[0].text = "; ".join(figures["marks"]) or "RAVDESS, unseen speakers"
    document.add_heading("Speech emotion recognition: report", 0)
    document.add_heading("Summary", 1)
    done = [name for name in rows if rows[name]["status"] == "run"]
    best = max(done, key=lambda name: rows[name]["validation"]["uar"])
    for name in dict.fromkeys([*([] if "cnn" not in done else ["cnn"]), best]):
        document.add_paragraph(f"{ROWS[name].title} reaches {rows[name]['test']['uar']:.1%} UAR and "
                               f"{rows[name]['test']['accuracy']:.1%} accuracy on {rows[name]['test']['clips']} test clips"
                               + (" (best row on validation)." if name == best else "."))
    for mark in figures["marks"]:
        document.add_paragraph(f"Mind: {mark}.", "List Bullet")
    document.add_heading("Data", 1)
    for line in describe_audit(audit):
        document.add_paragraph(line, "List Bullet")
    document.add_heading("Split", 1)
    for split, part in audit["splits"].items():
        document.add_paragraph(f"{split}: {part['clips']} clips of actors {', '.join(map(str, part['actors']))}", "List Bullet")
    document.add_heading("Training and validation accuracy", 1)
    table = result_table(rows)
    add_table(document, table[[c for c in table if c in ("model", "train acc", "val acc", "val UAR", "note")]])
    document.add_heading("Test results", 1)
    add_table(document, table[[c for c in table if c == "model" or c.startswith("test") or c == "note"]])
    document.add_heading("UAR by intensity and sex, test", 1)
    add_table(document, pd.DataFrame([{"model": ROWS[name].title} | {k: f"{v:.1%}" for k, v in rows[name]["groups"].items()}
                                      for name in done]))
    for name in dict.fromkeys(["cnn", best] if "cnn" in done else [best]):
        document.add_heading(f"{ROWS[name].title}: the most confident mistakes, test", 1)
        add_table(document, pd.DataFrame(rows[name]["mistakes"]))
    document.add_heading("Plots", 1)
    for path in plot_paths(rows, cfg):
        document.add_picture(str(path), width=Cm(17))
    document.add_heading("What the figures mean, and what they do not", 1)
    for line in MEANING:
        document.add_paragraph(line, "List Bullet")
    document.add_heading("Settings", 1)
    add_table(document, pd.DataFrame(sorted(config["settings"].items()), columns=["setting", "value"]))
    document.add_heading("How to repeat this", 1)
    document.add_paragraph(config["command"])
    document.add_paragraph("; ".join(f"{name} {version}" for name, version in config["versions"].items()))
    document.add_paragraph(CITATION[0])
    with replacing(Path(cfg.output_dir) / "emotion_recognition_report.docx") as temporary:
        document.save(temporary)


def plot_paths(rows, cfg):
    """The plots of a finished run, in the order of the report."""
    names = ["class_counts", "samples", "training_curves", "comparison"]
    names += [f"confusion_{ROWS[name].stem}" for name in rows if rows[name]["status"] == "run"]
    return [Path(cfg.output_dir) / "plots" / f"{name}.png" for name in names]


# %% 17. The demo
DEMO_VOICES = {  # pitch and its range in semitones, syllables a second, level in dB, roughness, brightness
    "neutral": (0, 1, 4.0, -6, 0.00, 1.0), "calm": (-3, 1, 2.8, -12, 0.00, 0.6), "happy": (5, 6, 5.0, -2, 0.02, 1.6),
    "sad": (-2, 2, 2.6, -14, 0.05, 0.5), "angry": (4, 3, 5.2, 0, 0.35, 2.2), "fearful": (8, 3, 6.2, -6, 0.20, 1.2),
    "disgust": (-4, 4, 3.2, -5, 0.30, 1.0), "surprised": (9, 9, 4.2, -3, 0.02, 1.6),
}


def synthesize(emotion, actor, rng, rate):
    """A speech-like synthetic clip, float samples (n,): harmonics with formants, in syllables; no word, no feeling."""
    pitch, span, tempo, level, rough, bright = DEMO_VOICES[emotion]
    voice = random.Random(actor)
    base = (115 if actor % 2 else 205) * 2 ** ((voice.uniform(-2, 2) + pitch + rng.normal(0, 0.7)) / 12)
    tempo *= rng.uniform(0.9, 1.1)
    t = np.arange(int(rate * 5 / tempo)) / rate
    melody = span * (np.sin(2 * np.pi * tempo / 3 * t + rng.uniform(0, 6)) + 1.5 * (t / t[-1] if emotion == "surprised" else -t / t[-1]) / 2)
    f0 = base * 2 ** (melody / 12) * (1 + rough * 0.1 * np.repeat(rng.normal(size=len(t) // 80 + 1), 80)[:len(t)])
    phase, syllable = np.cumsum(2 * np.pi * f0 / rate), (t * tempo).astype(int)
    scale = (1 if actor % 2 else 1.16) * voice.uniform(0.95, 1.05)
    formants = scale * np.array([[700, 1200, 2500], [400, 2000, 2600], [500, 900, 2400], [300, 2300, 3000]])[rng.integers(0, 4, 9)]
    wave = np.zeros_like(t)
    for harmonic in range(1, 25):
        distance = (harmonic * f0[:, None] - formants[syllable]) / 180  # (n, 3)
        wave += np.sin(harmonic * phase) * (0.03 + np.exp(-distance**2 / 2).sum(axis=1)) * harmonic ** (-1.2 / bright)
    wave += rough * rng.normal(size=len(t)) * np.abs(wave)
    wave *= np.sin(np.pi * (t * tempo % 1)) ** 0.7
    wave = np.concatenate([np.zeros(rate // 5), wave / np.abs(wave).max() * 10 ** (level / 20), np.zeros(rate // 5)])
    return 0.9 * wave + rng.normal(0, 3e-4, len(wave))


def write_demo_corpus(folder, actors=range(1, 25), statements=(1, 2), rate=16000):
    """Write synthetic clips under RAVDESS names, one per actor, emotion and statement, those that are missing."""
    def write(name):
        path = Path(folder, f"Actor_{name[-2:]}", f"{name}.wav")
        if not path.exists():
            emotion, actor = EMOTIONS[int(name[6:8]) - 1], int(name[-2:])
            samples = synthesize(emotion, actor, np.random.default_rng(int(name.replace("-", ""))), rate)
            with replacing(path) as temporary:
                soundfile.write(temporary, samples, rate, "PCM_16")
    in_parallel(write, [f"03-01-{e:02}-01-{s:02}-01-{a:02}" for a in actors for e in range(1, 9) for s in statements],
                "Writing the demo corpus")


def write_demo_encoder(folder):
    """Write a small, untrained DistilBERT whose vocabulary is the sentence bank's, in the usual folder layout."""
    import tokenizers
    import transformers
    if (folder / "model.safetensors").exists():
        return
    words = sorted({word for texts in sentence_bank().values() for text in texts for word in words_in(text)})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "!", ",", "'", *words]
    tokenizer = tokenizers.BertWordPieceTokenizer({token: index for index, token in enumerate(tokens)}, lowercase=True)
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(tokens), dim=64, n_layers=2, n_heads=4, hidden_dim=128,
                                           max_position_embeddings=64)
    transformers.DistilBertModel(config).save_pretrained(folder)


# %% 18. The phases and main
def data_phase(cfg, device):
    """Find, check, split, transcribe and transform the corpus: `clips` with all its columns."""
    clips, audit = index_clips(find_corpus(cfg))
    clips = add_features(clips, audit, cfg)
    clips = add_transcripts(split_clips(clips, cfg), cfg, device)
    audit = complete_audit(clips, audit)
    audit["splits"] = {split: {"clips": len(part), "actors": sorted(int(a) for a in part["actor"].unique())}
                       for split, part in ((s, clips[clips["split"] == s]) for s in SPLITS)}
    print("\n".join(describe_audit(audit)))
    for split, part in audit["splits"].items():
        print(f"{split:10} {part['clips']:5d} clips, actors {' '.join(map(str, part['actors']))}")
    folder = Path(cfg.output_dir)
    write_table(folder / "clips.csv", clips.drop(columns="mel"))
    write_json(folder / "audit.json", audit)
    write_label_encoder(folder / "label_encoder.pkl")
    key = digest(clips.drop(columns="mel").to_csv(), {name: getattr(cfg, name) for name in FEATURES}, marks(cfg))
    reuse("data plots", key, plot_paths({}, cfg)[:2], cfg, lambda: (plot_counts(clips, cfg), plot_samples(clips, cfg)))
    return clips


def write_label_encoder(path):
    """A scikit-learn LabelEncoder with the classes in code order, for the user's own code; never read here."""
    from sklearn.preprocessing import LabelEncoder
    encoder = LabelEncoder()
    encoder.classes_ = np.array(EMOTIONS)
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(encoder))


def reuse(name, key, files, cfg, make):
    """Make files unless they are there and were made under the same key; a notebook sees its figures every time."""
    path = Path(cfg.output_dir) / "cache" / f"{name.replace(' ', '_')}.key"
    if path.exists() and path.read_text() == key and all(file.exists() for file in files) and not in_kernel():
        print(f"Reused: {name}")
        return
    make()
    with replacing(path) as temporary:
        temporary.write_text(key)


def models_to_run(cfg):
    """The short names that this phase may train, in order; --phase fusion leaves out what no fusion needs."""
    asked = names_in(cfg.run_models)
    if cfg.phase == "fusion":
        asked = [n for n in asked if MODELS[n].parts or any(n in MODELS[f].parts for f in asked)]
    return [n for n in MODELS if n in asked and not (cfg.phase == "unimodal" and MODELS[n].parts)]


def check_needs(cfg, names):
    """Find now what would stop the run after an hour: text encoder, torchaudio, disk, python-docx. Raises UserError."""
    load_torchaudio()
    path = checkpoint_path(cfg, "bert")
    if "bert" in names and (not path.exists() or differences(read_or_empty(path).get("fingerprint", {}), fingerprint(cfg, "bert"))):
        load_text_encoder(cfg.bert_model)
    if importlib.util.find_spec("docx") is None:
        print("The .docx report will be left out: pip install python-docx, then --phase report")
    folder = Path(cfg.output_dir)
    with replacing(folder / ".writable"):  # is it?
        (folder / "..writable.tmp").touch()
    free, need = shutil.disk_usage(folder).free / 1e9, 0.1 if cfg.demo else 2.0
    if free < need:
        raise UserError(f"{folder} has {free:.1f} GB left of the {need} GB that this needs: free some or name another --output-dir")


def read_or_empty(path):
    """A checkpoint, or {} where there is none that can be used."""
    try:
        return read_checkpoint(path) if path.exists() else {}
    except UserError:
        return {}


def epoch_seconds(name, clips, cfg, device):
    """About how long an epoch of one model takes, from three training steps."""
    if MODELS[name].parts:  # forward passes only
        return 0.4 * sum(epoch_seconds(part, clips, cfg, device) for part in MODELS[name].parts)
    model, settings = build_model(name, clips, cfg, device), settings_for(cfg, name)
    train = make_dataset(model, clips[clips["split"] == "train"], cfg, device, augment=True)
    trainer, times = Trainer(model, settings, 10, None, device), []
    model.train()
    for _ in range(3):
        start = time.perf_counter()
        trainer.step(train.__getitems__(list(range(min(settings["batch_size"], len(train))))))
        times.append(time.perf_counter() - start)
    return min(times) * len(train) / settings["batch_size"]


def plan_training(clips, names, cfg, device):
    """Say what will run and what is reused; returns the names to train. Raises UserError when a part is lacking."""
    todo = {name: reason for name in names if (reason := out_of_date(cfg, name, clips))}
    print(f"\nPlan: {device} ({str(training_precision(device))[6:]}), {torch.get_num_threads()} threads, into {cfg.output_dir}")
    total = 0.0
    for name in names:
        old = read_or_empty(checkpoint_path(cfg, name))
        before = f"{old['epochs']} epochs, validation UAR {old['scores']['uar']:.1%}" if old else ""
        for part in MODELS[name].parts:
            if part not in names and (reason := out_of_date(cfg, part, clips)):
                raise UserError(f"{MODELS[name].title} needs {checkpoint_path(cfg, part)} ({reason}): add {part} to --run-models")
        if name not in todo:
            print(f"  {MODELS[name].title:24} reused ({before})")
            continue
        minutes = settings_for(cfg, name)["epochs"] * epoch_seconds(name, clips, cfg, device) / 60
        total += minutes
        print(f"  {MODELS[name].title:24} {settings_for(cfg, name)['epochs']} epochs, about {minutes:.1f} min ({todo[name]})"
              + (f"; replaces {before}, kept as *.previous.pth" if old else ""))
    print(f"  about {total:.1f} min of training", flush=True)
    return list(todo)


def combine_late(row, cfg):
    """Late fusion: the mean of two rows' probabilities, as a predictions table."""
    tables = [read_output(predictions_path(cfg, ROWS[part].stem), pd.read_csv) for part in row.parts]
    table = tables[0].copy()
    table[EMOTIONS] = sum(part[EMOTIONS].to_numpy() for part in tables) / len(tables)
    table["predicted"] = table[EMOTIONS].idxmax(axis=1)
    return table


def score_row(name, clips, cfg):
    """All scores of one finished row from its predictions table."""
    table = read_output(predictions_path(cfg, ROWS[name].stem), pd.read_csv)
    row = {"title": ROWS[name].title, "status": "run"}
    for split in SPLITS:
        part = table[table["split"] == split]
        row[split] = score(part[EMOTIONS].to_numpy(), part["true"].map(EMOTIONS.index).to_numpy())
    test = table[table["split"] == "test"].merge(clips[["clip", "intensity", "sex"]], on="clip")
    test["intensity"] = test["intensity"].map({1: "normal intensity", 2: "strong intensity"})
    row["groups"] = {group: recall(part["true"], part["predicted"]) for column in ("intensity", "sex")
                     for group, part in test.groupby(column)}
    wrong = test[test["true"] != test["predicted"]].assign(confidence=test[EMOTIONS].max(axis=1).round(3))
    row["mistakes"] = wrong.nlargest(10, "confidence")[["clip", "actor", "true", "predicted", "confidence"]].to_dict("records")
    return row


def evaluate_phase(clips, cfg):
    """Combine late fusion, score all seven rows, write metrics.json and config.json; returns the figures."""
    rows, asked = {}, names_in(cfg.run_models)
    for name, row in ROWS.items():
        if name in LATE:
            lacking = [ROWS[part].title for part in row.parts if rows[part]["status"] != "run"]
            reason = f"{' and '.join(lacking)} did not run" if lacking else ""
            if not reason:
                write_table(predictions_path(cfg, row.stem), combine_late(row, cfg))
        else:
            reason = out_of_date(cfg, name, clips)
            reason = "left out by --run-models" if reason and name not in asked else reason
        rows[name] = {"title": row.title, "status": f"not run: {reason}"} if reason else score_row(name, clips, cfg)
    figures = {"marks": marks(cfg), "split": cfg.split, "fold": cfg.folds, "classes": EMOTIONS,
               "text_encoder": cfg.bert_model, "rows": rows}
    settings = {name.lower(): getattr(cfg, name.lower()) for name in SETTINGS}
    flags = [f"--{'' if value is not False else 'no-'}{key.replace('_', '-')}" + ("" if type(value) is bool else f" {value}")
             for key, value in settings.items() if key in cfg.given and key != "phase" and not (cfg.demo and key == "output_dir")]
    write_json(Path(cfg.output_dir) / "metrics.json", figures)
    write_json(Path(cfg.output_dir) / "config.json", {"command": " ".join(["python emotion_recognition.py", *flags]),
                                                      "settings": settings, "versions": versions()})
    print("\n" + "; ".join(marks(cfg)))
    print(result_table(rows).to_string(index=False))
    return figures


def report_settings(cfg):
    """The settings of the finished run in OUTPUT_DIR, and a UserError where a flag or a checkpoint contradicts them."""
    folder = Path(cfg.output_dir)
    saved = read_output(folder / "config.json", lambda p: json.loads(p.read_text(encoding="utf-8"))["settings"])
    keep = {"phase": cfg.phase, "output_dir": cfg.output_dir, "given": cfg.given}
    asked = {key: getattr(cfg, key) for key in cfg.given if key not in ("phase", "output_dir", "device", "demo")}
    cfg = SimpleNamespace(**(saved | asked | keep))
    figures = read_output(folder / "metrics.json", lambda p: json.loads(p.read_text(encoding="utf-8")))
    for name in MODELS:
        if figures["rows"][name]["status"] == "run":
            changed = differences(read_checkpoint(checkpoint_path(cfg, name))["fingerprint"], fingerprint(cfg, name))
            if changed:
                raise UserError(f"{checkpoint_path(cfg, name)} is of another run ({changed}): leave out the flag, or train "
                                "again with --phase all")
    return cfg


def report_phase(cfg):
    """Plots and .docx from what lies in OUTPUT_DIR; reused when nothing of it has changed."""
    folder = Path(cfg.output_dir)
    figures, audit, config = (read_output(folder / f"{name}.json", lambda p: json.loads(p.read_text(encoding="utf-8")))
                              for name in ("metrics", "audit", "config"))
    rows, document = figures["rows"], folder / "emotion_recognition_report.docx"
    with_docx = importlib.util.find_spec("docx") is not None

    def make():
        plot_curves(rows, cfg)
        plot_comparison(rows, cfg)
        for name, row in rows.items():
            if row["status"] == "run":
                plot_confusion(name, row, cfg)
        if with_docx:
            write_report(figures, audit, config, cfg)
        else:
            print(f"{document} is left out: pip install python-docx, then --phase report")
    if all(row["status"] != "run" for row in rows.values()):
        raise UserError(f"no model in {folder} is trained: run --phase all first, or name another --output-dir")
    reuse("report", digest(figures, audit, config["settings"], with_docx),
          plot_paths(rows, cfg) + [document] * with_docx, cfg, make)
    print(f"Report: {document if with_docx else folder / 'plots'}")


def main(argv=None):
    """Run the phases that the settings ask for; `argv` as on the command line. Raises UserError."""
    cfg = parse_settings(argv)
    if not in_kernel():
        plt.switch_backend("agg")
    if cfg.phase == "report":
        return report_phase(report_settings(cfg))
    device, names = pick_device(cfg), models_to_run(cfg)
    if cfg.demo:
        write_demo_corpus(cfg.ravdess_path)
        write_demo_encoder(Path(cfg.bert_model))
    if cfg.phase != "data":
        check_needs(cfg, names)
    clips = data_phase(cfg, device)
    if cfg.phase == "data":
        return None
    for name in plan_training(clips, names, cfg, device):
        train_model(name, clips, cfg, device)
    evaluate_phase(clips, cfg)
    return report_phase(cfg) if cfg.phase == "all" else None


# %% 19. Run
if __name__ == "__main__":
    try:
        main()
    except (UserError, KeyboardInterrupt) as stop:
        if in_kernel():
            raise
        print(f"error: {stop}" if isinstance(stop, UserError) else "stopped; what is finished is kept", file=sys.stderr)
        sys.exit(2 if isinstance(stop, UserError) else 130)
