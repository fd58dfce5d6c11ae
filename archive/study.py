"""How reliable must words be before fusion helps? The study of --sentence-noise.

    python archive/study.py -- --ravdess-path FOLDER --folds 0,1,2,3,4    flags of emotion_recognition.py
    python archive/study.py -- --demo                                     in minutes, the figures mean nothing

Trains at each of LEVELS, the share of clips whose sentences are dealt anew, with both kinds of early fusion,
into OUTPUT_DIR/noise_X; AudioCNN, which reads no words, is trained once. Leaves study.csv and study.png in
OUTPUT_DIR. What is up to date is used again, so that a study that was stopped goes on where it was.
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

LEVELS = 0.0, 0.25, 0.5, 0.75, 1.0  # of SENTENCE_NOISE; at 1 words say nothing
TEXT_MODELS = "rnn", "bert"
FIGURES = ["uar", "low", "high", "sd_folds", "sd_seeds", "nll", "ece"]


def check(cfg):
    """Raise a UserError when the flags cannot make a study."""
    for key in ("sentence_noise", "fusion", "phase", "only_run"):
        flag = er.flag_of(key, getattr(cfg, key))
        er.refuse({f"{flag} is decided by the study: leave it out": key in cfg.given})

    simulated = cfg.use_simulated_sentences
    if cfg.manifest:
        clips = er.list_manifest(cfg.manifest)
        simulated = simulated and "transcript" not in clips
    if not simulated:
        raise er.UserError("the study needs simulated sentences: leave out --no-use-simulated-sentences, and "
                           "take transcripts out of --manifest")

    asked = er.names_in(cfg.run_models)
    parts = [er.SYSTEMS[name].parts for name in asked]
    trained = set(asked).union(*parts)
    if "cnn" not in trained or trained.isdisjoint(TEXT_MODELS):
        raise er.UserError("the study compares words with sound: add cnn and rnn or bert to --run-models")


def level_flags(flags, folder, noise):
    """The flags of the run at one level of noise, which has a folder of its own."""
    folder = Path(folder, f"noise_{noise}")
    return [*flags, "--fusion=both", f"--sentence-noise={noise}", f"--output-dir={folder}"]


def share_audio(first, other):
    """Copy the AudioCNN of each run at the first level of noise to another level."""
    for source, target in zip(er.runs_of(first), er.runs_of(other)):
        content = er.file_of(source, "cnn").read_bytes()
        er.save(er.file_of(target, "cnn"), content)


def compare(results, noise):
    """The figures at one level: a row per text model and system that reads it, AudioCNN with each.

    `minus_audio` is the pooled test UAR minus that of AudioCNN, `minus_audio_low` and `minus_audio_high` end
    its paired 95 % interval; `minus_text` is the same against the text model.
    """
    summary = er.summarize(results)
    pooled = er.figures_of(results)["uar"].xs("test", level="split")
    draws = er.bootstrap(results)

    tables = []
    for text in draws.columns.intersection(TEXT_MODELS):
        table = summary[FIGURES].assign(text_model=er.SYSTEMS[text].title, noise=noise)
        table["text_uar"] = summary.at[text, "uar"]
        for key, other in {"audio": "cnn", "text": text}.items():
            gaps = draws.sub(draws[other], axis=0)  # paired: the same draws for both
            table[f"minus_{key}"] = pooled - pooled[other]
            table[f"minus_{key}_low"] = gaps.quantile(0.025)
            table[f"minus_{key}_high"] = gaps.quantile(0.975)
        shown = [name for name in draws if name in ("cnn", text) or text in er.SYSTEMS[name].parts]
        tables.append(table.loc[shown])

    table = pd.concat(tables).rename_axis("system").reset_index()
    table["title"] = table["system"].map(results.titles)
    table["chance"] = 1 / len(results.classes)
    table["caveats"] = "; ".join(results.config["caveats"])
    return table


def draw(table, path):
    """Draw the test UAR of every system against that of its words alone, a panel per text model."""
    models = table["text_model"].unique()
    size = 6.5 * len(models), 5.5
    figure, axes = er.plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models):
        part = table[table["text_model"] == model].sort_values("text_uar", kind="stable")
        for title, line in part.groupby("title", sort=False):
            axis.plot(line["text_uar"], line["uar"], "o-", label=title)
        axis.axhline(part["chance"].max(), color="firebrick", label="chance")
        axis.set_title(model)
        axis.set_xlabel("test UAR of the words alone, by noise in the sentences")
        axis.set_ylabel("test UAR")
        axis.set_ylim(0, 1.01)
        axis.legend(fontsize=8, loc="lower right")

    caveats = "; ".join(table["caveats"]).split("; ")
    caveats = [caveat for caveat in dict.fromkeys(caveats) if ", noise" not in caveat]
    er.save_figure(figure, path, caveats)


def show(table):
    """Print the table of a study, figures and differences with their intervals in %."""
    numbers = table.filter(regex="uar|minus")
    percent = (100 * numbers).round(1)
    texts = table[["text_model", "noise", "title"]].join(percent)
    print("\nTest UAR and differences in %")
    print(texts.to_string(index=False))


def main(argv):
    """Run all levels and compare them; `argv` holds flags of emotion_recognition.py. Raises UserError."""
    flags = [flag for flag in argv if flag != "--"]
    cfg = er.parse_settings(flags)
    check(cfg)

    tables, levels = [], []
    for noise in LEVELS:
        command = level_flags(flags, cfg.output_dir, noise)
        levels.append(er.parse_settings(command))
        if len(levels) > 1:
            share_audio(levels[0], levels[-1])
        er.main(command)
        results = er.read_results(levels[-1].output_dir)
        tables.append(compare(results, noise))

    table = pd.concat(tables, ignore_index=True)
    table = table.sort_values(["text_model", "noise"], kind="stable")
    folder = Path(cfg.output_dir)
    er.save(folder / "study.csv", table)
    draw(table, folder / "study.png")
    show(table)
    print(f"Study: {folder}/study.csv and study.png")


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
