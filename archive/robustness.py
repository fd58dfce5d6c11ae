"""How robust are trained models? Their answers to recordings that were changed, and their UAR by sex.

    python archive/robustness.py outputs FOLDER-OF-RAVDESS --clips 60        or a table as of --manifest

Small changes are those of audeering's ser-tests (arXiv 2312.06270). Tones are in dB of the clip's peak, noise
in dB below its mean power. "no speech" is a changed, wrong answer that finds all emotions equally likely.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import butter, sosfilt

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er


def tone(x, rate, frequency, decibels):
    """A sine (n,) of `frequency` Hz, its amplitude in dB of the peak of samples (n,)."""
    angle = 2 * np.pi * frequency * np.arange(len(x)) / rate
    return 10 ** (decibels / 20) * np.abs(x).max() * np.sin(angle)


def noise(x, rate, decibels, exponent=0):
    """Noise (n,) so many dB below samples (n,), with power as frequency ** -exponent from 20 Hz on."""
    seed = int(er.digest(x.tobytes()), 16)  # a clip has the same noise each time
    white = np.random.default_rng(seed).standard_normal(len(x))
    frequency = np.fft.rfftfreq(len(x), 1 / rate).clip(20)
    coloured = np.fft.irfft(np.fft.rfft(white) / frequency ** (exponent / 2), len(x))
    return 10 ** (-decibels / 20) * np.linalg.norm(x) / np.linalg.norm(coloured) * coloured


def band(x, rate, low, high):
    """Samples (n,) between two frequencies in Hz; a file with fewer keeps those that it has."""
    edges = np.clip((low, high), 1, 0.499 * rate)
    return sosfilt(butter(4, edges, "bandpass", fs=rate, output="sos"), x)


CHANGES = {  # of samples (n,) at `rate` Hz, at which they stay, but for those at 8 kHz
    "none": lambda x, rate: x,
    # Small ones, after which nobody would hear another emotion.
    "tone, 5000 Hz at -40 dB": lambda x, rate: x + tone(x, rate, 5000, -40),
    "zeros before, 0.5 s": lambda x, rate: np.pad(x, (rate // 2, 0)),
    "zeros after, 0.5 s": lambda x, rate: np.pad(x, (0, rate // 2)),
    "clipping, loudest 0.3 %": lambda x, rate: x.clip(*np.quantile(x, (0.0015, 0.9985))),
    "cropped beginning, 50 ms": lambda x, rate: x[rate // 20:],
    "cropped end, 50 ms": lambda x, rate: x[:-(rate // 20)],
    "gain, -6 dB": lambda x, rate: x * 10 ** (-6 / 20),
    "gain, -20 dB": lambda x, rate: x * 10 ** (-20 / 20),
    "high-pass, 50 Hz": lambda x, rate: band(x, rate, 50, np.inf),
    "low-pass, 7500 Hz": lambda x, rate: band(x, rate, 0, 7500),
    "white noise, 30 dB": lambda x, rate: x + noise(x, rate, 30),
    "8 kHz": lambda x, rate: er.soxr.resample(x, rate, 8000),
    "telephone, 300-3400 Hz": lambda x, rate: band(x, rate, 300, 3400),
    "-40 dB in 16 bits": lambda x, rate: np.round(x * 10 ** (-40 / 20) * 32768) / 32768,
    "white noise, 20 dB": lambda x, rate: x + noise(x, rate, 20),
    "white noise, 10 dB": lambda x, rate: x + noise(x, rate, 10),
    "white noise, 0 dB": lambda x, rate: x + noise(x, rate, 0),
    "pink noise, 10 dB": lambda x, rate: x + noise(x, rate, 10, exponent=1),
    "hum, 50 Hz at -20 dB": lambda x, rate: x + tone(x, rate, 50, -20),
    "speed 0.9": lambda x, rate: er.soxr.resample(x, rate * 0.9, rate),
    "speed 1.1": lambda x, rate: er.soxr.resample(x, rate * 1.1, rate),
}


def find_clips(source, predictor, count):
    """`count` clips of a folder or table, of the test split if any are, with their `split` in training."""
    cfg = predictor.cfg._replace(ravdess_path=source, manifest=source * source.lower().endswith(".csv"),
                                 given=("ravdess_path",), **er.AS_IT_IS)
    clips = er.read_corpus(cfg, predictor.classes).clips.drop(columns=er.FEATURES)
    clips = clips[clips["emotion"].isin(predictor.classes)].sort_values("digest")
    er.refuse({f"{source} has no clip that is {' or '.join(predictor.classes)}": clips.empty})

    # By name too: in another format the same clip has other bytes.
    known = pd.DataFrame(next(iter(predictor.checkpoints.values())).windows)
    sounds = er.shared_sound(pd.concat([clips["digest"], known["digest"]], ignore_index=True)).to_numpy()
    clips["sound"], known["sound"] = sounds[:len(clips)], sounds[len(clips):]
    by_sound, by_name = (dict(zip(known[key], known["split"])) for key in ("sound", "clip"))
    clips["split"] = clips["sound"].map(by_sound).fillna(clips["clip"].map(by_name)).fillna("unknown")
    if "test" in set(clips["split"]):
        clips = clips[clips["split"] == "test"]
    turns = clips.groupby(["emotion", "actor"], observed=True).cumcount()
    return clips.iloc[np.argsort(turns, kind="stable")[:count]]


def answers_to(clips, predictor, titles):
    """The answers to clips after every change: a row per clip, change and system (the index)."""
    tables, channel = [], predictor.cfg.channel
    predictor.cfg = predictor.cfg._replace(channel=0)  # of what is changed there is one
    refusal = dict.fromkeys(predictor.classes, 1 / len(predictor.classes)) | {"predicted": er.NO_SPEECH}
    for clip in er.tqdm(clips.itertuples(), "Clips", len(clips)):
        traits = clip._asdict()
        part, rate = next(er.sound_parts(clip.path, span=traits.pop("span", er.WHOLE)))
        samples, _ = er.one_channel(part, channel)
        for change, changed in CHANGES.items():
            heard = predictor.hear(changed(samples, rate), {"8 kHz": 8000}.get(change, rate))
            table = predictor.as_a_whole(*heard).reindex(titles).fillna(refusal)
            tables.append(table.assign(change=change, **traits))
    return pd.concat(tables)


def show(answers, classes):
    """Print the figures of one system by change, and its UAR by sex."""
    table = er.score(answers, classes, ["change"])[["uar", "ece", "ece_if_perfect"]].rename_axis(None)
    said = answers.pivot(index="clip", columns="change", values="predicted").replace(er.NO_SPEECH, np.nan)
    table.insert(0, "unchanged", said.eq(said["none"], axis=0).mean())
    table[er.NO_SPEECH] = said.isna().sum()
    table[["unchanged", "uar"]] = table[["unchanged", "uar"]].map(er.percent)
    print("", answers.index[0], table.to_string(float_format="%.3f"), sep="\n")

    clean = answers.query("change == 'none'")
    if set(clean.get("sex", ())) == {"female", "male"}:
        female = np.tile(clean["sex"] == "female", (1001, 1)).astype(np.float32)
        female[1:] = np.random.default_rng(0).permuted(female[1:], axis=1)
        women, men = (er.weighted_uar(who, clean, classes) for who in (female, 1 - female))
        gap, *by_chance = abs(women - men)
        uar_and_gaps = map(er.percent, [women[0], men[0], gap, np.quantile(by_chance, 0.95)])
        print("UAR: female {}, male {}; gap {}, by chance up to {} (95 % quantile)".format(*uar_and_gaps))


def main(argv):
    """Print the figures that a command asks for. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="OUTPUT_DIR of trained models")
    parser.add_argument("corpus", help="folder of RAVDESS, or a table of clips")
    parser.add_argument("--clips", type=int, default=150, help="how many (default: 150)")
    parser.add_argument("--no-gate", action="store_true", help="ask no speech gate: Whisper's is slow")
    parser.add_argument("--system", help="such as cnn (default: all that hear)")
    asked = parser.parse_args(argv)
    predictor = er.Predictor(asked.folder)
    if asked.no_gate:
        predictor.gate = lambda *heard: (True, "")
    names = [name for name in er.SYSTEMS if name in predictor.thresholds and not er.reads_words(name)]
    er.refuse({f"--clips {asked.clips} is less than 1": asked.clips < 1,
               f"--system {asked.system} is none of {', '.join(names)}": asked.system not in [*names, None]})

    clips = find_clips(asked.corpus, predictor, asked.clips)
    known = clips["split"].isin(["train", "validation"]).sum()
    print(er.plural(len(clips), "clip"), f"models trained on {known} of them", *predictor.caveats, sep="; ")
    titles = [er.SYSTEMS[name].title for name in names if asked.system in (name, None)]
    answers = answers_to(clips, predictor, titles)
    for title in titles:
        show(answers.loc[[title]], predictor.classes)


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
