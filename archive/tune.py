"""Search the settings of a model with Optuna, by its NLL on validation actors; no test clip is heard.

    python archive/tune.py --models speech --trials 50 -- --folds 0,1,2,3,4    flags of emotion_recognition.py

A setting among the flags is not searched. OUTPUT_DIR/tune_MODEL gets trials.csv, best.json, plots, and
trials.journal, with which the same command goes on, also beside others. The present settings come first.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

RANGES = {  # of settings, as Optuna's suggest_float and suggest_categorical take them
    "learning_rate_cnn": dict(low=5e-4, high=8e-3, log=True),
    "learning_rate_rnn": dict(low=5e-4, high=8e-3, log=True),
    "learning_rate_bert": dict(low=2e-5, high=2e-3, log=True),
    "speech_c": dict(low=1e-5, high=0.1, log=True),
    "weight_decay": dict(low=0.005, high=0.5, log=True),
    "dropout": dict(low=0.1, high=0.6), "word_dropout": dict(low=0.0, high=0.6),
    "label_smoothing": dict(low=0.0, high=0.2), "mixup": dict(low=0.0, high=0.6),
    "ema_decay": dict(choices=[0.9, 0.97, 0.99, 0.997]), "batch_size": dict(choices=[16, 32, 64])}


def open_study(path, cfg, ranges, facts):
    """Optuna's study in `path`; a new one begins with cfg's settings. Raises UserError for other facts."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
    path.parent.mkdir(parents=True, exist_ok=True)
    third = getattr(cfg, f"epochs_{cfg.run_models}", 0) // 3
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    er.warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # its plots, since 2020
    try:
        storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
        study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True,
                                    pruner=optuna.pruners.MedianPruner(n_warmup_steps=third))
        changes = er.differences(study.user_attrs.get("facts", facts), facts)
    except Exception as error:  # foreign files raise many kinds
        changes = f"not readable, {type(error).__name__}"
    er.refuse({f"{path} is of another search ({changes}): move it or name another --output-dir": changes})
    study.set_user_attr("facts", facts)
    study.sampler = optuna.samplers.TPESampler(seed=cfg.seed + len(study.trials))
    if all(trial.state.name == "FAIL" for trial in study.trials):
        study.enqueue_trial({key: getattr(cfg, key) for key in ranges}, {"present": True})
    return study


def score(logits, labels):
    """(NLL at the temperature that is best for it, UAR) of logits (W, C) with labels (W,)."""
    nll = er.F.cross_entropy(logits / er.fit_temperature(logits, labels), labels)
    return float(nll), er.recall(labels.numpy(), logits.argmax(dim=1).numpy())


def objective(trial, ranges, clips_of):
    """The mean validation NLL over the folds, of settings that a trial draws; it keeps all figures."""
    import optuna
    settings, nlls, steps, logits_of = {}, [], itertools.count(), er.logits_of
    for key, ends in ranges.items():
        value = (trial.suggest_categorical if "choices" in ends else trial.suggest_float)(key, **ends)
        settings[key] = type(value)(f"{value:.4g}")  # short enough to copy
    trial.set_user_attr("flags", " ".join(map(er.flag_of, settings, settings.values())))
    print(f"\nTrial {trial.number}: {trial.user_attrs['flags']}", flush=True)

    def reported(model, validation):
        """Logits (N, C), which every epoch asks for once: the mean over folds so far may end the trial."""
        logits = logits_of(model, validation)
        nll = np.mean([*nlls, score(logits, validation.labels)[0]])
        trial.report(nll, next(steps))
        er.refuse({f"NLL {nll:.3f}, worse than the median": np.isnan(nll) or trial.should_prune()})
        return logits

    for run, clips in clips_of.items():
        run, kind, device = run._replace(**settings), er.SYSTEMS[run.run_models].kind, er.pick_device(run)
        with mock.patch.object(er, "logits_of", reported), tempfile.TemporaryDirectory() as folder:
            try:
                model, _ = er.train(kind, {}, clips, run, device, Path(folder, "state"), {})
            except er.UserError as reason:  # also a loss that is not finite
                trial.set_user_attr("pruned", str(reason))
                raise optuna.TrialPruned from None
        windows = er.windows_of(clips[clips["split"] == "validation"], run)
        logits = er.mean_of_views(er.infer(model, windows, run, device), run)
        nll, uar = score(logits, er.torch.tensor(windows["emotion"].cat.codes.tolist()))
        nlls.append(nll)
        trial.set_user_attr(f"nll_fold_{run.fold} {run.split}".removesuffix(" speaker"), nll)
        trial.set_user_attr(f"uar_fold_{run.fold} {run.split}".removesuffix(" speaker"), uar)
    return np.mean(nlls)


def conclude(study, folder, cfg, caveats):
    """Write and print what a search has found. Raises UserError when no trial was completed."""
    from optuna.visualization import matplotlib as plots
    table = study.trials_dataframe(("number", "state", "value", "user_attrs"))
    table.columns = table.columns.str.removeprefix("user_attrs_").str.replace("value", "nll")
    table["uar"] = table.filter(like="uar_fold").mean(axis=1, skipna=False)
    er.save(folder / "trials.csv", table)
    done = table[table["state"] == "COMPLETE"].sort_values("nll")
    er.refuse({f"no trial was completed, {folder}/trials.csv has the reasons": done.empty})
    for plot in (plots.plot_optimization_history, plots.plot_param_importances):
        plot(study, target_name="validation NLL")
        path = folder / f"{plot.__name__}.png"
        er.save_figure(er.plt.gcf(), path, caveats, words=er.reads_words(cfg.run_models))
    folds, gaps, present = done.filter(like="nll_fold"), [], done["present"].first_valid_index()
    for half in itertools.combinations(folds, (len(folds.columns) + 1) // 2):
        chosen, others = folds[[*half]].mean(axis=1).idxmin(), folds.drop(columns=[*half]).mean(axis=1)
        gaps.append((others[chosen] - others.min(), others[chosen] - others.get(present, np.nan)))
    gap = "Chosen on {} of {} folds: NLL on the others {:+.3f} over the best, {:+.3f} over the present."
    gap = gap.format(len(half), len(folds.columns), *np.mean(gaps, axis=0)) * (len(folds.columns) > 1)
    top = done[["number", "nll", "uar", "flags"]].head()
    command = f"{er.command_of(cfg)} {top['flags'].iloc[0]}"
    er.save(folder / "best.json", top.iloc[0].to_dict() | {"gap": gap, "command": command})
    print("", top.to_string(index=False), gap, command, sep="\n")


def main(argv):
    """Go on with a search until it has as many trials as are asked for. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, choices=["cnn", "speech", "rnn", "bert"])
    parser.add_argument("--trials", type=int, default=50, help="how many in all (default: 50)")
    asked, flags = parser.parse_known_args(argv)
    cfg = er.parse_settings([*(flag for flag in flags if flag != "--"), f"--run-models={asked.models}"])
    searched = er.SYSTEMS[asked.models].kind.depends_on(cfg).keys() - {*cfg.given}
    ranges = {key: ends for key, ends in RANGES.items() if key in searched}
    er.refuse({f"--trials {asked.trials} is less than 1": asked.trials < 1,
               "every setting of the search stands among the flags: leave one out": not ranges,
               "a search has no use for --phase, --input, --runs": cfg.phase != "all" or cfg.runs > 1,
               "a search reads no transcripts of Whisper's": not cfg.use_simulated_sentences})
    er.load_package("optuna.storages.journal", 'pip install "optuna>=4"')
    corpus, folder = er.read_corpus(cfg), Path(cfg.output_dir, f"tune_{asked.models}")
    er.models_asked(cfg, corpus)
    clips_of = {run: er.add_transcripts(er.split_clips(corpus, run).query("split != 'test'"), corpus, run)
                for run in er.runs_of(cfg)}
    facts = er.fingerprint_of(cfg, asked.models, er.pd.concat(clips_of.values()))
    facts |= {"folds": cfg.folds, "test_views": str(cfg.test_views), "ranges": str(ranges)}
    study = open_study(folder / "trials.journal", cfg, ranges, facts)
    try:
        while sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials) < asked.trials:
            study.optimize(lambda trial: objective(trial, ranges, clips_of), n_trials=1)
    finally:
        conclude(study, folder, cfg, corpus.caveats)


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
