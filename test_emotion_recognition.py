"""Tests of emotion_recognition.py. They make their own small corpus and need no network.

    pip install -r requirements.txt pytest hypothesis jupytext nbclient ipykernel
    python -m pytest                              everything but the speed measurements, a few minutes
    python -m pytest -m benchmark -s              the speed measurements
    RAVDESS_PATH=folder python -m pytest -k real  what the real corpus must look like

One demo run on six actors with one epoch per model (fixture `finished`) is made once; tests read it or copy it.
"""

import ast
import contextlib
import functools
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

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

SCRIPT = Path(er.__file__)
DEMO = "--demo --epochs-cnn 1 --epochs-rnn 1 --epochs-bert 1 --epochs-fusion 1 --device cpu".split()
SIX_ACTORS = functools.partial(er.write_demo_corpus, actors=range(1, 7))
CORPUS, OUTPUT = Path("archive/demo/corpus"), Path("outputs/demo")
UNIMODAL = [name for name in er.MODELS if not er.MODELS[name].parts]
READS_TEXT = [name for name in er.MODELS if name != "cnn"]
CLIP = "03-01-05-01-02-01-03"  # a training clip of the demo corpus


# ---------------------------------------------------------------------------------------------- helpers and fixtures
def config(**changes):
    """The default settings on the CPU, with changes."""
    cfg = er.parse_settings([])
    vars(cfg).update({"device": "cpu", **changes})
    return cfg


def touch(folder, *names):
    """Write files that differ from each other; only their names matter."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())


def snapshot(folder):
    """What lies under a folder: path -> (time of change, bytes)."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def checkpoint_times():
    return {path.name: path.stat().st_mtime_ns for path in OUTPUT.glob("*.pth")}


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
    """The current folder as a copy of the finished demo."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


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
    cfg.output_dir, cfg.bert_model = str(finished / OUTPUT), str(finished / cfg.bert_model)
    clips, audit = er.index_clips(finished / CORPUS)
    clips = er.split_clips(er.add_features(clips, audit, cfg), cfg)
    return cfg, er.add_transcripts(clips, cfg, "cpu")


@pytest.fixture(scope="session")
def all_names(tmp_path_factory):
    """index_clips and its audit for 1440 tiny files under the names of the corpus, two with the same bytes."""
    folder = tmp_path_factory.mktemp("names")
    codes = itertools.product(range(1, 9), (1, 2), (1, 2), (1, 2), range(1, 25))
    names = [f"03-01-{e:02}-{i:02}-{s:02}-{r:02}-{a:02}" for e, i, s, r, a in codes if (e, i) != (1, 2)]
    touch(folder, *(f"Actor_{name[-2:]}/{name}.wav" for name in names))
    for name in ("03-01-03-01-02-01-07", "03-01-03-01-02-02-07"):
        (folder / f"Actor_07/{name}.wav").write_bytes(b"same")
    return er.index_clips(folder)


def batch_of(model, clips, cfg, rows=slice(None), augment=False):
    dataset = er.make_dataset(model, clips.iloc[rows], cfg, "cpu", augment)
    return dataset[list(range(len(dataset)))]


# ---------------------------------------------------------------------------------------------- the corpus
def test_labels_come_from_the_name_in_code_order(tmp_path):
    touch(tmp_path, *(f"03-01-{code:02}-01-01-02-{10 + code}.wav" for code in range(1, 9)))
    clips, _ = er.index_clips(tmp_path)
    assert list(clips["emotion"]) == er.EMOTIONS == [
        "neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
    assert list(clips["actor"]) == list(range(11, 19)) and list(clips["sex"][:2]) == ["male", "female"]
    assert set(clips["intensity"]) == {1} and set(clips["statement"]) == {1} and set(clips["repetition"]) == {2}


def test_label_encoder_keeps_the_code_order(finished):
    encoder = pickle.loads((finished / OUTPUT / "label_encoder.pkl").read_bytes())
    assert list(encoder.inverse_transform(range(8))) == er.EMOTIONS


def test_a_name_that_occurs_twice_counts_once(tmp_path):
    for folder in ("", "archive/deep/Actor_12/"):
        touch(tmp_path, f"{folder}03-01-05-01-02-01-12.wav", f"{folder}03-01-06-01-02-01-12.wav")
    clips, audit = er.index_clips(tmp_path)
    assert len(clips) == 2 and audit["twins"] == 2


def test_two_names_with_the_same_bytes_are_both_kept_and_reported(all_names):
    clips, audit = all_names
    assert len(clips) == 1440
    assert audit["same_bytes"] == [["03-01-03-01-02-01-07", "03-01-03-01-02-02-07"]]


def test_song_and_video_are_counted_and_left_out(tmp_path):
    touch(tmp_path, "03-01-05-01-02-01-12.flac", "03-02-05-01-02-01-12.wav", "03-02-04-01-02-01-12.wav",
          "01-01-05-01-02-01-12.mp4", "02-01-05-01-02-01-12.mp4", "01-02-05-01-02-01-12.mp4", "memo.wav", "a.txt")
    clips, audit = er.index_clips(tmp_path)
    assert list(clips["clip"]) == ["03-01-05-01-02-01-12"]
    assert audit["files"] == {"speech": 1, "song": 2, "video": 3, "other": 1}


def test_audit_counts_what_is_there_and_what_is_missing(all_names):
    clips, audit = all_names
    clips = er.split_clips(clips, config())
    full, less = er.complete_audit(clips, audit), er.complete_audit(clips[clips["actor"] > 1], audit)
    assert full["missing"] == [] and full["per_emotion"] == {e: 96 if e == "neutral" else 192 for e in er.EMOTIONS}
    assert full["per_actor"] == {str(actor): 60 for actor in range(1, 25)}
    assert len(less["missing"]) == 60 and all(name.endswith("-01") for name in less["missing"])
    assert "the first 03-01-01-01-01-01-01" in " ".join(er.describe_audit(less))


# ---------------------------------------------------------------------------------------------- splits
FOLD_TABLE = [("2 5 14 15 16", "3 6"), ("3 6 7 13 18", "10 11"), ("10 11 12 19 20", "8 17"),
              ("8 17 21 23 24", "1 14"), ("1 4 9 22", "2 5")]


@pytest.mark.parametrize("fold", range(5))
def test_folds_are_those_of_the_literature(all_names, fold):
    clips = er.split_clips(all_names[0], config(folds=str(fold)))
    actors = {split: set(part["actor"]) for split, part in clips.groupby("split")}
    test, validation = ({int(actor) for actor in text.split()} for text in FOLD_TABLE[fold])
    assert actors == {"test": test, "validation": validation, "train": set(range(1, 25)) - test - validation}


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 99), min_size=3, max_size=40))
def test_any_group_of_actors_is_split_without_overlap_and_tested_once(actors):
    actors, tested = sorted(actors), []
    for fold in range(min(5, len(actors))):
        validation, test = er.fold_actors(actors, fold)
        assert test and validation and not set(test) & set(validation) and len(test) + len(validation) < len(actors)
        assert er.fold_actors(list(actors), fold) == (validation, test)
        tested += test
    assert sorted(tested) == actors


@pytest.mark.parametrize("seed", range(3))
def test_random_split_is_stratified_and_keeps_same_bytes_together(all_names, seed):
    clips = all_names[0].copy()
    clips.loc[::9, "digest"] = clips.loc[4::9, "digest"].to_numpy()[:len(clips.loc[::9])]  # many pairs
    clips = er.split_clips(clips, config(split="random", seed=seed))
    assert clips.groupby("digest")["split"].nunique().max() == 1
    once = clips.drop_duplicates("digest")
    shares = pd.crosstab(once["emotion"], once["split"], normalize="index")[["train", "validation", "test"]]
    assert np.allclose(shares, [0.7, 0.15, 0.15], atol=0.015)


# ---------------------------------------------------------------------------------------------- sentences
def test_bank_holds_thirty_sentences_per_emotion_all_different():
    bank = er.sentence_bank()
    assert list(bank) == er.EMOTIONS and {len(sentences) for sentences in bank.values()} == {30}
    assert len({sentence.lower() for sentences in bank.values() for sentence in sentences}) == 240
    assert not [s for emotion, sentences in bank.items() for s in sentences if emotion in er.words_in(s)]


def test_five_folds_test_every_sentence_once_and_share_none():
    for sentences in er.sentence_bank().values():
        for fold in range(5):
            parts = [er.sentences_of(sentences, split, fold) for split in er.SPLITS]
            assert sorted(itertools.chain(*parts)) == sorted(sentences)
            assert parts[1] == sentences[(fold + 1) % 5::5] and parts[2] == sentences[fold::5]


@pytest.mark.parametrize("fold", range(5))
def test_nine_of_ten_test_tokens_occur_in_training(fold):
    train, test = ([word for sentences in er.sentence_bank().values()
                    for sentence in er.sentences_of(sentences, split, fold) for word in er.words_in(sentence)]
                   for split in ("train", "test"))
    assert np.isin(test, train).mean() >= 0.9


@pytest.mark.parametrize("split", ["speaker", "random"])
def test_sentences_are_drawn_reproducibly_and_stay_in_their_split(all_names, split):
    cfg = config(split=split, folds="3")
    clips = er.split_clips(all_names[0], cfg)
    drawn = er.add_transcripts(clips, cfg, "cpu")
    again = er.add_transcripts(clips.sample(frac=1, random_state=0), cfg, "cpu").sort_index()
    assert drawn["transcript"].equals(again["transcript"])
    assert not drawn["transcript"].equals(er.add_transcripts(clips, config(split=split, folds="3", seed=7), "cpu")["transcript"])
    bank = er.sentence_bank()
    assert all(row.transcript in er.sentences_of(bank[row.emotion], row.split, 3) for row in drawn.itertuples())
    assert drawn["transcript"].nunique() > 230
    cache = pickle.loads(Path("outputs/ravdess_transcripts_simulated.pkl").read_bytes())
    assert dict(zip(drawn["clip"], drawn["transcript"])) in cache.values() and len(cache) == 2


def test_vocabulary_is_of_the_training_split_only(demo):
    cfg, clips = demo
    clips = clips.copy()
    clips.loc[clips["split"] != "train", "transcript"] = "xylophone"
    model = er.build_model("rnn", clips, cfg, "cpu")
    assert "xylophone" not in model.spec["vocabulary"] and model.spec["vocabulary"][:2] == ["<pad>", "<unk>"]
    assert model.tokenize(["xylophone", ""])["tokens"].tolist() == [[1], [1]]


# ---------------------------------------------------------------------------------------------- sound
def tone(seconds, rate, pitch=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("scale", [1, 0.005])
def test_trimming_is_relative_to_the_peak_of_the_clip(scale):
    samples = np.zeros(48000, np.float32)
    samples[16000:32000], samples[:200], samples[40000:] = 0.8, 0.02, -0.02  # the rest is 32 dB below
    cut = er.trim_silence(samples * np.float32(scale), config())
    assert np.array_equal(cut, samples[16000 - 800:32000 + 1600 - 1] * np.float32(scale))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_any_sampling_rate_is_resampled(rate):
    soundfile.write("tone.wav", tone(1.5, rate), rate)
    samples = er.load_audio("tone.wav", 16000)
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(24000, abs=2)
    assert np.abs(samples[2000:-2000] - tone(1.5, 16000)[2000:len(samples) - 2000]).max() < 0.01


def test_log_mel_is_that_of_torchaudio_within_float16(demo):
    import torchaudio
    cfg, clips = demo
    samples = er.trim_silence(er.load_audio(clips["path"][0], cfg.sampling_rate), cfg)
    transform = torchaudio.transforms.MelSpectrogram(
        cfg.sampling_rate, cfg.n_fft, hop_length=cfg.hop_length, f_min=50.0, f_max=cfg.sampling_rate / 2,
        n_mels=cfg.n_mels, center=True, pad_mode="constant")
    expected = (transform(torch.from_numpy(samples)) + 1e-6).log().T.numpy()
    mel = er.log_mel(samples, cfg)
    assert mel.dtype == np.float16 and mel.shape == (1 + len(samples) // cfg.hop_length, 1, cfg.n_mels)
    assert np.abs(mel[:, 0].astype(float) - expected).max() < 2.0 ** -8 + 1e-3  # half a step of float16 at 8 to 16


def test_a_faster_voice_is_heard_higher():
    cfg = config(n_mels=128)
    fast = er.log_mel(tone(1, 16000, 1000), cfg, (1.0, 1.19))[20:40, 1].astype(float).mean(axis=0)
    higher = er.log_mel(tone(1, 16000, 1190), cfg)[20:40, 0].astype(float).mean(axis=0)
    assert abs(int(fast.argmax()) - int(higher.argmax())) <= 1
    assert fast.argmax() > er.log_mel(tone(1, 16000, 1000), cfg)[20].argmax() + 3


def test_a_short_clip_is_repeated_at_its_ends_and_a_long_one_cut_in_the_middle(demo):
    cfg, clips = demo
    frames = round(cfg.clip_seconds * cfg.sampling_rate / cfg.hop_length)
    lengths = [frames - 41, frames + 40]
    mels = [np.tile(np.arange(n, dtype=np.float16)[:, None, None], (1, len(er.speeds(cfg)), cfg.n_mels)) for n in lengths]
    windows = er.AudioDataset(clips[:2].assign(mel=pd.Series(mels)), cfg, "cpu")[[0, 1]]["mel"][:, 0, 0]
    assert windows[0].tolist() == [0] * 21 + list(range(frames - 41)) + [frames - 42] * 20
    assert windows[1].tolist() == list(range(20, 20 + frames))


def test_a_random_view_differs_each_time_and_keeps_the_shape(demo):
    cfg, clips = demo
    dataset = er.AudioDataset(clips, cfg, "cpu", augment=True)
    first, second = dataset[[0, 1, 2]]["mel"], dataset[[0, 1, 2]]["mel"]
    assert first.shape == second.shape == er.AudioDataset(clips, cfg, "cpu")[[0, 1, 2]]["mel"].shape
    assert first.isfinite().all() and (first - second).abs().mean() > 0.1


def test_mixup_mixes_labels_as_it_mixes_sound():
    labels = torch.arange(8)
    mixed = er.mix({"label": labels, "mel": F.one_hot(labels, 8).float()}, 0.3)
    assert torch.equal(mixed["mel"], mixed["label"]) and mixed["label"].shape == (8, 8)
    assert torch.allclose(mixed["label"].sum(dim=1), torch.ones(8))


def test_word_dropout_hides_words_but_no_special_tokens(demo):
    cfg, clips = demo
    model = er.build_model("bert", clips, cfg, "cpu")
    plain = batch_of(model, clips, cfg)["input_ids"]
    hidden = batch_of(model, clips, SimpleNamespace(**vars(cfg) | {"word_dropout": 0.3}), augment=True)["input_ids"]
    changed, words = plain != hidden, ~torch.isin(plain, torch.tensor(model.special_ids))
    assert (hidden[changed] == model.hidden_id).all() and not changed[~words].any()
    assert 0.2 < changed[words].float().mean() < 0.4


# ---------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 8, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert er.fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize(("confidences", "right", "expected"), [
    ([0.8, 0.8, 0.6, 0.6], [1, 0, 1, 1], (0.6 + 0.8) / 4),
    ([1.0, 1.0], [1, 1], 0.0),
    ([1.0, 0.98], [0, 1], 0.49),  # both in the last bin: their errors cancel in part
])
def test_calibration_error_of_counted_cases(confidences, right, expected):
    probabilities = np.array([[c, 1 - c] for c in confidences])
    assert er.calibration_error(probabilities, 1 - np.array(right)) == pytest.approx(expected)


@pytest.mark.parametrize(("true", "found", "expected"), [
    ([0, 0, 0, 1], [0, 0, 1, 1], (2 / 3 + 1) / 2), ([2, 2, 5, 5], [2, 2, 0, 1], 0.5), ([7], [7], 1.0)])
def test_uar_is_the_mean_recall_of_the_classes_that_occur(true, found, expected):
    assert er.recall(np.array(true), np.array(found)) == pytest.approx(expected)


def test_every_score_of_a_counted_case():
    true = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0])
    probabilities = np.full((9, 8), 0.04)
    probabilities[range(9), [0, 1, 2, 3, 4, 5, 6, 6, 1]] = 0.72
    scores = er.score(probabilities, true)
    assert scores["clips"] == 9 and scores["accuracy"] == pytest.approx(7 / 9) and scores["uar"] == pytest.approx(6.5 / 8)
    assert scores["macro_f1"] == pytest.approx((5 + 2 / 3 + 2 / 3 + 2 / 3) / 8)
    assert scores["nll"] == pytest.approx(-(7 * np.log(0.72) + 2 * np.log(0.04)) / 9)
    assert scores["ece"] == pytest.approx(7 / 9 - 0.72) and list(scores["per_class"]) == er.EMOTIONS
    assert scores["confusion"][7][6] == scores["confusion"][0][1] == scores["confusion"][0][0] == 1
    assert json.loads(json.dumps(scores)) == scores  # builtins only


def test_late_fusion_is_the_mean_of_probabilities():
    cfg = config()
    for stem, sure in (("AudioCNN", 0.9), ("TextRNN", 0.5)):
        table = pd.DataFrame(0.0, index=[0, 1], columns=er.EMOTIONS).assign(split="test", clip=["a", "b"], predicted="?")
        table["sad" if stem == "AudioCNN" else "happy"] = [sure, 1 - sure]
        er.save(Path(cfg.output_dir, "predictions", f"{stem}.csv"), table)
    fused = er.combine_late("late_rnn", cfg)
    assert np.allclose(fused[["sad", "happy"]], [[0.45, 0.25], [0.05, 0.25]])
    assert list(fused["predicted"]) == ["sad", "happy"] and list(fused["clip"]) == ["a", "b"]


# ---------------------------------------------------------------------------------------------- command line
def constants_of_the_source():
    """Name -> (value, trailing comment) of the plain upper-case constants of the script."""
    source = SCRIPT.read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(node.value)
                if isinstance(value, bool | int | float | str):
                    line = source.splitlines()[node.lineno - 1]
                    found[node.targets[0].id] = value, line.partition("  # ")[2].strip()
    return found


def flags_of_the_parser():
    return {flag for action in er.make_parser()._actions for flag in action.option_strings}


def test_every_constant_is_a_flag_and_every_flag_a_constant():
    constants = constants_of_the_source()
    flags = {"--" + name.lower().replace("_", "-") for name in constants}
    negated = {"--no-" + name.lower().replace("_", "-") for name, (value, _) in constants.items() if type(value) is bool}
    assert flags_of_the_parser() - {"-h", "--help"} == flags | negated
    assert set(er.SETTINGS) == set(constants) and len(constants) > 30


def test_help_is_the_trailing_comment_of_each_constant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(er.make_parser().format_help().split())
    for name, (value, comment) in constants_of_the_source().items():
        assert comment and f"{comment} (default: {value})" in text, name


@pytest.mark.parametrize("name", [n for n in er.SETTINGS if n not in ("DEMO", "RUN_MODELS", "SPEEDS", "RAVDESS_PATH")])
def test_every_flag_sets_its_setting(name):
    default, flag = getattr(er, name), "--" + name.lower().replace("_", "-")
    value = er.CHOICES.get(name.lower(), ("other", "other"))[1] if isinstance(default, str) else default / 2 + 0.1
    value = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else value
    argv = [flag if value else flag.replace("--", "--no-", 1)] if isinstance(default, bool) else [flag, str(value)]
    cfg = er.parse_settings(argv)
    assert getattr(cfg, name.lower()) == value != default and cfg.given == [name.lower()]


@pytest.mark.parametrize("name", [name for name, kind in er.SETTINGS.items() if kind is bool])
def test_boolean_flags_work_both_ways(name):
    flag = name.lower().replace("_", "-")
    assert getattr(er.parse_settings([f"--{flag}"]), name.lower()) is True
    assert getattr(er.parse_settings([f"--no-{flag}"]), name.lower()) is False


def test_a_constant_edited_at_run_time_counts(monkeypatch):
    monkeypatch.setattr(er, "EPOCHS_CNN", 3)
    assert er.settings_for(er.parse_settings([]), "cnn")["epochs"] == 3
    assert er.settings_for(er.parse_settings(["--epochs-cnn", "4"]), "cnn")["epochs"] == 4
    assert "AudioCNN (default: 3)" in " ".join(er.make_parser().format_help().split())


def test_the_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["site-packages/ipykernel_launcher.py", "-f", "kernel.json"])
    assert er.parse_settings() == er.parse_settings([])
    monkeypatch.setattr(sys, "argv", ["emotion_recognition.py", "--seed", "5"])
    assert er.parse_settings().seed == 5


def test_a_model_takes_its_own_constant_before_the_common_one():
    cfg = config(learning_rate=0.1, learning_rate_bert=0.2, epochs_fusion=77)
    assert [er.settings_for(cfg, name)["learning_rate"] for name in ("cnn", "rnn", "bert")] == [0.1, 0.1, 0.2]
    assert er.settings_for(cfg, "fusion_rnn")["epochs"] == er.settings_for(cfg, "fusion_bert")["epochs"] == 77


# ---------------------------------------------------------------------------------------------- the models
@pytest.mark.parametrize("name", er.MODELS)
class TestModel:
    def test_logits_do_not_depend_on_batch_mates(self, name, demo):
        cfg, clips = demo
        model = er.build_model(name, clips, cfg, "cpu").eval()
        together = model(batch_of(model, clips, cfg, slice(0, 8)))
        alone = torch.cat([model(batch_of(model, clips, cfg, slice(row, row + 1))) for row in range(8)])
        assert together.shape == (8, len(er.EMOTIONS)) and together.isfinite().all()
        assert torch.allclose(together, alone, atol=1e-4)

    def test_gradients_reach_every_parameter_that_is_not_frozen(self, name, demo):
        cfg, clips = demo
        model = er.build_model(name, clips, cfg, "cpu").train()
        batch = batch_of(model, clips, cfg, augment=True)
        (F.cross_entropy(model(batch), batch["label"]) + model.auxiliary_loss(batch)).backward()
        frozen = {key for key, p in model.named_parameters() if p.grad is None}
        assert frozen == {key for key, _ in model.named_parameters() if key.startswith("encoders.")}
        assert (len(frozen) > 0) == bool(er.MODELS[name].parts)
        silent = {key for key, p in model.named_parameters() if p.grad is not None and not p.grad.abs().sum() > 0}
        assert {key for key in silent if not key.endswith("bias")} == set()  # softmax ignores the bias of a score

    def test_overfits_one_batch(self, name, demo):
        cfg, clips = demo
        easy = SimpleNamespace(**vars(cfg) | {"dropout": 0.0})
        model = er.build_model(name, clips, easy, "cpu").train()
        training = er.settings_for(easy, name) | {"learning_rate": 3e-3, "label_smoothing": 0.0, "weight_decay": 0.0}
        steps = 40 if name == "cnn" else 80
        trainer = er.Trainer(model, training, steps, None, "cpu")
        first, *_, last = [trainer.step(batch_of(model, clips, easy, slice(0, 16))) for _ in range(steps)]
        assert last[1] == 1.0 and last[0] < 0.2 < 1.5 < first[0]

    def test_checkpoint_gives_the_predictions_that_were_saved(self, name, demo):
        cfg, clips = demo
        path = Path(cfg.output_dir, f"{er.MODELS[name].stem}_best.pth")
        checkpoint, model = torch.load(path, weights_only=True), er.restore_model(path)
        assert type(model) is er.MODELS[name].kind and not model.training
        logits = er.predict(model, er.make_dataset(model, clips, cfg, "cpu"))
        assert torch.equal(logits, er.predict(er.restore_model(path), er.make_dataset(model, clips, cfg, "cpu")))
        table = pd.read_csv(Path(cfg.output_dir, "predictions", f"{er.MODELS[name].stem}.csv")).set_index("clip")
        expected = (logits / checkpoint["temperature"]).softmax(dim=1).numpy()
        assert np.allclose(table.loc[clips["clip"], er.EMOTIONS], expected, atol=1e-5)

    def test_checkpoint_is_self_contained_and_strict(self, name, demo):
        cfg, clips = demo
        path = Path(cfg.output_dir, f"{er.MODELS[name].stem}_best.pth")
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["classes"] == er.EMOTIONS and checkpoint["model"] == name
        assert checkpoint["spec"]["classes"] == 8 and checkpoint["epochs"] == 1
        assert checkpoint["fingerprint"] == er.fingerprint(cfg, name, clips)
        assert checkpoint["config"]["seed"] == 42 and checkpoint["versions"]["torch"] == torch.__version__
        assert checkpoint["features"]["n_mels"] == cfg.n_mels and 0 <= checkpoint["scores"]["uar"] <= 1
        assert "synthetic" in " ".join(checkpoint["marks"])
        checkpoint["weights"].pop(next(reversed(checkpoint["weights"])))
        torch.save(checkpoint, "broken.pth")
        with pytest.raises((RuntimeError, er.UserError)):
            er.restore_model(Path("broken.pth"))

    def test_fingerprint_sees_data_and_settings(self, name, demo):
        cfg, clips = demo
        suffix = er.MODELS[name].suffix
        other = SimpleNamespace(**vars(cfg) | {f"epochs_{suffix}": 9})
        assert er.differences(er.fingerprint(cfg, name, clips), er.fingerprint(other, name, clips)) == "epochs 1 -> 9"
        changed = clips.assign(digest="0" * 16)
        assert "data changed" in er.differences(er.fingerprint(cfg, name, clips), er.fingerprint(cfg, name, changed))


@pytest.mark.parametrize("name", READS_TEXT)
def test_padding_never_changes_an_answer(name, demo):
    cfg, clips = demo
    model = er.build_model(name, clips, cfg, "cpu").eval()
    batch = batch_of(model, clips, cfg, slice(0, 8))
    longer = {key: F.pad(value, (0, 5)) if key in ("tokens", "input_ids", "attention_mask") else value
              for key, value in batch.items()}
    assert torch.allclose(model(batch), model(longer), atol=1e-5)


@pytest.mark.parametrize("name", READS_TEXT)
@pytest.mark.parametrize("text", ["", "...", "qwertz \u00e9\U0001f600", "word " * 500])
def test_any_transcript_has_an_answer(name, text, demo):
    cfg, clips = demo
    model = er.build_model(name, clips, cfg, "cpu").eval()
    assert model(batch_of(model, clips.assign(transcript=text), cfg, slice(0, 2))).isfinite().all()


@pytest.mark.parametrize("name", ["fusion_rnn", "fusion_bert"])
def test_early_fusion_leaves_its_parts_as_they_were_trained(name, demo):
    cfg, _ = demo
    fused = torch.load(Path(cfg.output_dir, f"{er.MODELS[name].stem}_best.pth"), weights_only=True)["weights"]
    for part in er.MODELS[name].parts:
        alone = torch.load(Path(cfg.output_dir, f"{er.MODELS[part].stem}_best.pth"), weights_only=True)["weights"]
        assert alone and all(torch.equal(value, fused[f"encoders.{part}.{key}"]) for key, value in alone.items())


def test_training_is_reproducible(demo):
    cfg, clips = demo
    tables = []
    for folder in ("once", "again"):
        er.train_model("rnn", clips, SimpleNamespace(**vars(cfg) | {"output_dir": folder}), "cpu")
        tables.append(pd.read_csv(Path(folder, "predictions/TextRNN.csv")))
        torch.rand(3)  # whatever was drawn before must not matter
    pd.testing.assert_frame_equal(*tables)
    pd.testing.assert_frame_equal(tables[0], pd.read_csv(Path(cfg.output_dir, "predictions/TextRNN.csv")))


# ---------------------------------------------------------------------------------------------- end to end
STEMS = [row.stem for row in er.ROWS.values()]
TRAINED = STEMS[:5]
LEFT = [*(f"{stem}_best.pth" for stem in TRAINED), *(f"histories/{stem}.csv" for stem in TRAINED),
        *(f"predictions/{stem}.csv" for stem in STEMS), *(f"plots/confusion_{stem}.png" for stem in STEMS),
        *(f"plots/{plot}.png" for plot in ("samples", "class_counts", "training_curves", "comparison")),
        *"label_encoder.pkl ravdess_transcripts_simulated.pkl metrics.json config.json".split(),
        "emotion_recognition_report.docx"]


@pytest.mark.parametrize("name", LEFT)
def test_a_run_leaves(name, finished):
    assert (finished / OUTPUT / name).stat().st_size > 100


def test_metrics_hold_seven_rows_that_agree_with_the_predictions(finished):
    figures = json.loads((finished / OUTPUT / "metrics.json").read_text())
    assert list(figures["rows"]) == list(er.ROWS) and len(figures["rows"]) == 7
    for name, row in figures["rows"].items():
        table = pd.read_csv(finished / OUTPUT / "predictions" / f"{er.ROWS[name].stem}.csv")
        assert row["status"] == "run" and ("oracle" in row["title"]) == (name != "cnn")
        for split in ("validation", "test"):
            part = table[table["split"] == split]
            recalls = [(group["predicted"] == emotion).mean() for emotion, group in part.groupby("true")]
            assert row[split]["clips"] == len(part) and row[split]["uar"] == pytest.approx(np.mean(recalls))
            assert row[split]["accuracy"] == pytest.approx((part["true"] == part["predicted"]).mean())
        wrong = part[part["true"] != part["predicted"]]
        assert [m["clip"] in set(wrong["clip"]) for m in row["mistakes"]] == [True] * min(10, len(wrong))


@pytest.mark.parametrize("stem", STEMS)
def test_predictions_keep_the_class_order_and_name_the_strongest(stem, finished):
    table = pd.read_csv(finished / OUTPUT / "predictions" / f"{stem}.csv")
    assert [column for column in table if column in er.EMOTIONS] == er.EMOTIONS
    assert np.allclose(table[er.EMOTIONS].sum(axis=1), 1, atol=1e-4)
    strongest = np.array(er.EMOTIONS)[table[er.EMOTIONS].to_numpy().argmax(axis=1)]
    ties = np.sort(table[er.EMOTIONS].to_numpy(), axis=1)[:, -2:].ptp(axis=1) < 2e-6 if hasattr(np.ndarray, "ptp") else \
        np.ptp(np.sort(table[er.EMOTIONS].to_numpy(), axis=1)[:, -2:], axis=1) < 2e-6
    assert ((table["predicted"] == strongest) | ties).all()
    codes = table["clip"].str[6:8].astype(int) - 1
    assert list(table["true"]) == [er.EMOTIONS[code] for code in codes] and set(table["split"]) >= {"validation", "test"}
    assert table["marks"].str.contains("oracle").all() and table["clip"].is_unique


def test_late_fusion_rows_are_made_of_their_parts(finished):
    tables = {stem: pd.read_csv(finished / OUTPUT / "predictions" / f"{stem}.csv").set_index("clip") for stem in STEMS}
    for name in ("late_rnn", "late_bert"):
        sound, text = (tables[er.ROWS[part].stem][er.EMOTIONS] for part in er.ROWS[name].parts)
        fused = tables[er.ROWS[name].stem][er.EMOTIONS]
        assert np.allclose(fused, (sound.loc[fused.index] + text.loc[fused.index]) / 2, atol=2e-6)


def test_report_has_its_tables_pictures_and_marks(finished):
    import docx
    document = docx.Document(finished / OUTPUT / "emotion_recognition_report.docx")
    of_all = [table for table in document.tables if len(table.rows) == 8 and "TextBERT" in table.cell(3, 0).text]
    assert ["val acc" in [cell.text for cell in table.rows[0].cells] for table in of_all] == [True, False]
    assert len(document.inline_shapes) == 11
    text = "\n".join(paragraph.text for paragraph in document.paragraphs)
    for words in ("synthetic", "simulated sentences (oracle)", "python emotion_recognition.py --demo",
                  "actors 3 4 5", "CC BY-NC-SA", "judging people"):
        assert words in text, words
    assert "synthetic" in document.sections[0].header.paragraphs[0].text


def test_the_command_that_is_written_down_gives_the_same_settings(finished):
    saved = json.loads((finished / OUTPUT / "config.json").read_text())
    assert saved["command"].startswith("python emotion_recognition.py --")
    assert er.settings_of(er.parse_settings(saved["command"].split()[2:])) == saved["settings"]


def test_the_same_command_again_trains_nothing(copied, trained):
    before = checkpoint_times()
    er.main(DEMO)
    assert trained == [] and checkpoint_times() == before and len(before) == 5


def test_new_epochs_retrain_the_model_and_what_hangs_on_it(copied, trained):
    before, command = checkpoint_times(), [*DEMO, "--phase", "fusion", "--epochs-cnn", "2"]
    er.main(command)
    assert trained == ["cnn", "fusion_rnn", "fusion_bert"]
    after = checkpoint_times()
    kept = {name for name in before if after[name] == before[name]}
    previous = {name.replace("_best.previous.pth", "") for name in after if ".previous." in name}
    assert kept == {"TextRNN_best.pth", "TextBERT_best.pth"}
    assert previous == {"AudioCNN", "EarlyFusion_RNN", "EarlyFusion_BERT"}
    assert after["AudioCNN_best.previous.pth"] == before["AudioCNN_best.pth"]
    assert len(pd.read_csv(OUTPUT / "histories/AudioCNN.csv")) == 2
    er.main(command)
    assert len(trained) == 3 and checkpoint_times() == after
    er.main(["--phase", "report", "--demo"])
    assert trained == ["cnn", "fusion_rnn", "fusion_bert"]


def test_report_needs_neither_corpus_nor_model(copied, monkeypatch):
    shutil.rmtree("archive")
    shutil.rmtree(OUTPUT / "plots" / "..", ignore_errors=True) if False else (OUTPUT / "emotion_recognition_report.docx").unlink()
    shutil.copy(OUTPUT / "plots/samples.png", "samples.png")
    monkeypatch.setattr(er, "restore_model", None)
    er.main(["--demo", "--phase", "report"])
    assert (OUTPUT / "emotion_recognition_report.docx").exists()


def test_without_python_docx_only_the_docx_is_left_out(copied, monkeypatch, capsys):
    real, document = er.importlib.util.find_spec, OUTPUT / "emotion_recognition_report.docx"
    document.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(er.importlib.util, "find_spec", lambda name, *rest: None if name == "docx" else real(name, *rest))
        er.main(DEMO)
    assert not document.exists() and "pip install python-docx" in capsys.readouterr().out
    assert all((OUTPUT / name).exists() for name in LEFT[:-1])
    er.main(["--demo", "--phase", "report"])
    assert document.exists()


def test_rows_that_were_left_out_are_shown_as_not_run(finished, capsys):
    er.main(["--ravdess-path", str(finished / CORPUS), "--run-models", "cnn,rnn,fusion_rnn", *DEMO[1:]])
    rows = json.loads(Path("outputs/metrics.json").read_text())["rows"]
    assert {name for name in rows if rows[name]["status"].startswith("not run: ")} == {"bert", "fusion_bert", "late_bert"}
    assert {rows[name]["status"] for name in ("cnn", "rnn", "fusion_rnn", "late_rnn")} == {"run"}
    assert "not run: left out by --run-models" in capsys.readouterr().out
    import docx
    document = docx.Document("outputs/emotion_recognition_report.docx")
    text = " ".join(cell.text for table in document.tables[:2] for row in table.rows for cell in row.cells)
    assert text.count("not run") == 6 and "synthetic" not in " ".join(p.text for p in document.paragraphs)


def test_a_random_split_marks_everything(finished, capsys):
    er.main(["--ravdess-path", str(finished / CORPUS), "--split", "random", "--run-models", "rnn", *DEMO[1:]])
    mark = "speakers shared between splits"
    assert mark in capsys.readouterr().out and mark in str(json.loads(Path("outputs/metrics.json").read_text())["marks"])
    assert pd.read_csv("outputs/predictions/TextRNN.csv")["marks"].str.contains(mark).all()
    assert mark in str(torch.load("outputs/TextRNN_best.pth", weights_only=True)["marks"])


def test_changed_feature_settings_never_meet_old_features(copied):
    before = {path.name for path in OUTPUT.glob("cache/log_mel_*")}
    er.main([*DEMO, "--phase", "data", "--trim-db", "20"])
    assert before and not before & {path.name for path in OUTPUT.glob("cache/log_mel_*")}
    er.main([*DEMO, "--phase", "data"])
    assert before == {path.name for path in OUTPUT.glob("cache/log_mel_*")}


def test_an_interrupted_write_leaves_the_old_file():
    er.save("table.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt), er.replacing("table.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in Path().iterdir()] == ["table.json"] and er.read_back(Path("table.json")) == {"old": 1}


def test_demo_never_writes_into_a_folder_that_the_user_named(tmp_path):
    own = tmp_path / "own"
    touch(own, "config.json", "vocab.txt", "pytorch_model.bin")
    before = snapshot(own)
    with contextlib.suppress(er.UserError):
        er.main([*DEMO, "--phase", "data", "--bert-model", str(own)])
    assert snapshot(own) == before


def test_plain_command_line_runs_the_demo():
    done = run_script(*DEMO)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "384 clips" in done.stdout.replace("speech clips", "clips")
    assert len(json.loads((OUTPUT / "metrics.json").read_text())["rows"]) == 7
    assert (OUTPUT / "emotion_recognition_report.docx").exists()


# ---------------------------------------------------------------------------------------------- Whisper
@pytest.fixture
def tiny_whisper(tmp_path, monkeypatch):
    """A Whisper checkpoint of random weights in Whisper's own file format; no program can be found, ffmpeg included."""
    from whisper.model import ModelDimensions, Whisper
    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 16, 2, 1, 51865, 16, 16, 2, 1)
    torch.save({"dims": vars(dims), "model_state_dict": Whisper(dims).state_dict()}, "little.pt")
    monkeypatch.setenv("PATH", "")
    return tmp_path / "little.pt"


def test_whisper_goes_on_where_it_was_stopped(tiny_whisper, demo, monkeypatch):
    from whisper.model import Whisper
    cfg = config(use_simulated_sentences=False, whisper_model=str(tiny_whisper))
    clips, cache, decode, sizes = demo[1][:10], Path("outputs/ravdess_transcripts_whisper_little.pkl"), Whisper.decode, []

    def stopped(self, mels, options):
        if sizes:
            raise KeyboardInterrupt
        sizes.append(len(mels))
        return decode(self, mels, options)

    def counted(self, mels, options):
        sizes.append(len(mels))
        return decode(self, mels, options)

    monkeypatch.setattr(Whisper, "decode", stopped)
    with pytest.raises(KeyboardInterrupt):
        er.add_transcripts(clips, cfg, "cpu")
    assert sum(map(len, pickle.loads(cache.read_bytes()).values())) == sizes[0] < 10
    monkeypatch.setattr(Whisper, "decode", counted)
    texts = er.add_transcripts(clips, cfg, "cpu")["transcript"]
    assert sum(sizes) == 10 and texts.map(type).eq(str).all() and texts.str.len().max() > 0
    monkeypatch.setattr(Whisper, "decode", None)  # nothing is left to decode
    assert er.add_transcripts(clips, cfg, "cpu")["transcript"].equals(texts)


def test_whisper_transcripts_feed_a_run_without_the_oracle_mark(tiny_whisper, finished, tmp_path):
    few = tmp_path / "few"
    for path in (finished / CORPUS).rglob("03-01-*-01-01-01-0[1-3].wav"):
        touch(few, path.name)
        shutil.copy(path, few)
    er.main(["--ravdess-path", str(few), "--no-use-simulated-sentences", "--whisper-model", str(tiny_whisper),
             "--run-models", "rnn", *DEMO[1:]])
    clips, metrics = pd.read_csv("outputs/clips.csv"), json.loads(Path("outputs/metrics.json").read_text())
    assert len(clips) == 24 and clips["transcript"].notna().any() and metrics["marks"] == []
    assert metrics["rows"]["rnn"]["status"] == "run" and "oracle" not in metrics["rows"]["rnn"]["title"]


# ---------------------------------------------------------------------------------------------- notebook
def edited(source, **constants):
    """The script's source with other constants."""
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = \S+", f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count == 1, name
    return source


def execute(notebook):
    """Run a notebook in a real kernel in the current folder; errors stay in its cells."""
    client = nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", allow_errors=True,
                                     resources={"metadata": {"path": str(Path.cwd())}})
    client.execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def errors_in(outputs):
    return [(o["ename"], o["evalue"], "\n".join(o["traceback"])) for o in outputs if o["output_type"] == "error"]


def test_notebook_made_of_the_script_runs_the_demo_and_shows_figures():
    source = SCRIPT.read_text(encoding="utf-8")
    notebook = jupytext.reads(edited(source, DEMO=True, EPOCHS_CNN=1, EPOCHS_RNN=1, EPOCHS_BERT=1, EPOCHS_FUSION=1,
                                     DEVICE="cpu").replace("actors=range(1, 25)", "actors=range(1, 7)"), fmt="py:percent")
    assert notebook.cells[0].cell_type == "markdown" and len(notebook.cells) >= 19
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in (
        "DEMO, RAVDESS_PATH = False, 'nowhere'\nmain()", "main(['--demo', '--phase', 'report'])")]
    outputs = execute(notebook)
    assert [o["data"]["text/plain"] for o in outputs if "image/png" in o.get("data", {})]
    ((kind, message, shown),) = errors_in(outputs)  # the one that was provoked
    assert kind == "UserError" and "nowhere" in message and "--ravdess-path" in message
    assert "Traceback" not in shown and "SystemExit" not in shown
    assert "Report: " in str(notebook.cells[-1].outputs) and (OUTPUT / "emotion_recognition_report.docx").exists()


def test_run_magic_and_import_work_in_a_notebook(finished):
    data = f"--phase data --device cpu --ravdess-path {finished / CORPUS}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (
        f"%run {SCRIPT} {data} --output-dir one", f"%run {SCRIPT} --ravdess-path nowhere",
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport emotion_recognition\n"
        f"emotion_recognition.main({data.split()!r} + ['--output-dir', 'two'])")])
    outputs = execute(notebook)
    ((kind, message, shown),) = errors_in(outputs)
    assert kind == "UserError" and "nowhere does not exist" in message and "SystemExit" not in shown
    assert pd.read_csv("one/clips.csv").equals(pd.read_csv("two/clips.csv"))


# ---------------------------------------------------------------------------------------------- bad input: works
def written(path, samples, rate=16000, subtype="PCM_16"):
    soundfile.write(path, samples, rate, subtype)
    return Path(path)


def speech(rate=16000):
    return er.synthesize("angry", 3, np.random.default_rng(0), rate).astype(np.float32)


@pytest.mark.parametrize(("make", "difference"), [
    (lambda: written("a.wav", speech(8000), 8000), None),
    (lambda: written("a.wav", speech(48000), 48000), None),
    (lambda: written("a.wav", speech(), subtype="PCM_U8"), None),
    (lambda: written("a.wav", speech(), subtype="PCM_24"), 0.3),
    (lambda: written("a.wav", speech(), subtype="FLOAT"), 0.3),
    (lambda: written("a.wav", np.stack([speech(), speech()], axis=1)), 0.3),
    (lambda: written("a.wav", np.stack([speech(), 0 * speech()], axis=1)), None),
    (lambda: written("a.wav", speech() * 0.006), None),
    (lambda: written("a.flac", speech()), 0.01),
    (lambda: written("a.ogg", speech(), subtype="VORBIS"), None),
    (lambda: written("a.mp3", speech(), subtype="MPEG_LAYER_III"), None),
    (lambda: written("a.wav", speech()[6000:10800]), None),
    (lambda: written("a.wav", np.tile(speech(8000), 700)[:8000 * 600], 8000), None),
], ids="8kHz 48kHz 8bit 24bit float stereo one-channel quiet flac ogg mp3 0.3s 10min".split())
def test_recording_works(make, difference, demo):
    cfg, clips = demo
    mel, plain = er.prepare_clip(make(), cfg), er.prepare_clip(written("plain.wav", speech()), cfg)
    assert isinstance(mel, np.ndarray), mel
    assert mel.shape[1:] == (len(er.speeds(cfg)), cfg.n_mels) and np.isfinite(mel).all()
    if difference:
        assert mel.shape == plain.shape and np.abs(mel.astype(float) - plain).max() < difference
    one = clips[:1].assign(mel=pd.Series([mel]))
    for augment in (False, True):
        assert er.AudioDataset(one, cfg, "cpu", augment)[[0]]["mel"].isfinite().all()


# ---------------------------------------------------------------------------------------------- bad input: left out
def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def with_sample(value):
    samples = speech()
    samples[500] = value
    return samples


BROKEN = {  # what is done to a clip, what the reason says
    "header cut": (lambda path: cut(path, 20), "not readable"),
    "data cut": (lambda path: cut(path, path.stat().st_size // 2), "cut off"),
    "zero length": (lambda path: cut(path, 0), "not readable"),
    "no samples": (lambda path: written(path, speech()[:0]), "no samples"),
    "silence": (lambda path: written(path, 0 * speech()), "silent"),
    "NaN": (lambda path: written(path, with_sample(np.nan), subtype="FLOAT"), "NaN or infinite"),
    "infinite": (lambda path: written(path, with_sample(np.inf), subtype="FLOAT"), "NaN or infinite"),
    "text": (lambda path: path.write_text("no sound"), "not readable"),
    "wrong emotion": (lambda path: path.rename(path.with_name("03-01-09-01-02-01-03.wav")), "none of RAVDESS's"),
}


def test_unusable_clips_are_named_and_left_out_and_the_run_goes_on(finished, capsys):
    shutil.copytree(finished / CORPUS, "corpus")
    expected = {}
    for code, (spoil, reason) in enumerate(BROKEN.values()):
        path = Path(f"corpus/Actor_0{3 + code // 8}/03-01-{1 + code % 8:02}-01-02-01-0{3 + code // 8}.wav")
        result = spoil(path)
        expected[str(result if isinstance(result, Path) else path)] = reason
    for _ in range(2):  # the second time from the cache
        er.main(["--ravdess-path", "corpus", "--run-models", "rnn", *DEMO[1:]])
        audit, output = json.loads(Path("outputs/audit.json").read_text()), capsys.readouterr().out
        assert audit["clips"] == 96 - len(BROKEN) and set(audit["left_out"]) == set(expected)
        for path, reason in expected.items():
            assert reason in audit["left_out"][path] and f"Left out: {path}: " in output
    assert len(pd.read_csv("outputs/predictions/TextRNN.csv")) == 96 - len(BROKEN)


def test_a_flac_file_that_was_cut_is_left_out():
    path = written("a.flac", speech())
    cut(path, path.stat().st_size // 2)
    assert isinstance(er.prepare_clip(path, config()), str)


# ---------------------------------------------------------------------------------------------- bad input: one sentence
class Hostile:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def remove(folder, pattern):
    for path in list(Path(folder).rglob(pattern)):
        path.unlink()


def foreign_whisper():
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")


def broken_torchaudio(monkeypatch):
    """A torchaudio whose library does not fit the installed torch."""
    touch(".", "torchaudio/functional.py")
    Path("torchaudio/__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(Path.cwd()))


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def full_disk(monkeypatch):
    monkeypatch.setattr(er.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def nothing():
    pass


OUT, REPORT, FUSE = "outputs/demo", "--demo --phase report", "--phase fusion --run-models fusion_rnn"
CNN, CACHE = f"{OUT}/AudioCNN_best.pth", f"{OUT}/ravdess_transcripts_simulated.pkl"
ONE_SENTENCE = {  # what is wrong: (how to make it so, command line, what the sentence must name)
    "mistyped flag": (nothing, "--epoch-cnn 3", "--epoch-cnn"),
    "abbreviated flag": (nothing, "--epochs-cn 3", "--epochs-cn"),
    "wrong type": (nothing, "--epochs-cnn many", "--epochs-cnn|many"),
    "no epochs": (nothing, "--epochs-cnn 0", "--epochs-cnn 0"),
    "share above one": (nothing, "--dropout 1.5", "--dropout 1.5"),
    "not a number": (nothing, "--mixup nan", "--mixup nan"),
    "unknown phase": (nothing, "--phase train", "--phase|train|fusion"),
    "unknown model": (nothing, "--run-models cnn,lstm", "--run-models|lstm|fusion_rnn"),
    "bad speeds": (nothing, "--speeds 1,fast", "--speeds|fast"),
    "unknown fold": (nothing, "--folds 7", "--folds|7"),
    "no such device": (no_gpu, "--ravdess-path CORPUS --device cuda", "--device cuda"),
    "demo with a corpus": (nothing, "--ravdess-path CORPUS", "--ravdess-path|--demo"),
    "no corpus at all": (nothing, "--no-demo", "zenodo.org|--ravdess-path|--demo|archive|kaggle"),
    "path does not exist": (nothing, "--ravdess-path nowhere", "nowhere|does not exist|--ravdess-path"),
    "path is a file": (lambda: touch(".", "file"), "--ravdess-path file", "file|is a file|--ravdess-path"),
    "path is empty": (lambda: Path("empty").mkdir(), "--ravdess-path empty", "empty|is empty|--ravdess-path"),
    "other audio": (lambda: touch("other", "memo.wav"), "--ravdess-path other", "other|03-01-|--ravdess-path"),
    "only wrong codes": (lambda: touch("odd", "03-01-09-01-01-01-01.wav"), "--ravdess-path odd", "odd|--ravdess-path"),
    "only broken clips": (lambda: touch("bad", "03-01-01-01-01-01-01.wav"), "--ravdess-path bad", "bad|--ravdess-path"),
    "one actor": (lambda: [remove("own", f"*-0{a}.wav") for a in range(2, 7)], "--ravdess-path own", "1 actor|--ravdess-path"),
    "fold without actors": (lambda: [remove("own", f"*-0{a}.wav") for a in (4, 5, 6)], "--ravdess-path own --folds 3",
                            "3 actor|--folds"),
    "class that vanished": (lambda: remove("own", "03-01-07-*"), "--ravdess-path own", "disgust|--ravdess-path"),
    "output cannot be written": (lambda: touch(".", "file"), "--ravdess-path CORPUS --output-dir file/x", "file|--output-dir"),
    "full disk": (full_disk, "--ravdess-path CORPUS --output-dir outputs/demo", "outputs/demo|--output-dir"),
    "torchaudio": (broken_torchaudio, "--ravdess-path CORPUS", 'pip install "torch|torchaudio'),
    "nothing to report": (nothing, "--phase report --output-dir none", "none|--phase all"),
    "report of other settings": (nothing, f"{REPORT} --epochs-cnn 9", "AudioCNN_best.pth|epochs 1 -> 9"),
    "truncated checkpoint, report": (lambda: cut(Path(CNN), 5000), REPORT, f"{CNN}|--phase"),
    "foreign checkpoint, report": (lambda: torch.save({"a": 1}, CNN), REPORT, f"{CNN}|--phase"),
    "hostile checkpoint, report": (lambda: torch.save(Hostile(), CNN), REPORT, f"{CNN}|--phase"),
    "pickle as checkpoint, report": (lambda: Path(CNN).write_bytes(pickle.dumps(Hostile())), REPORT, f"{CNN}|--phase"),
    "truncated metrics, report": (lambda: cut(Path(OUT, "metrics.json"), 200), REPORT, "metrics.json|--phase all"),
    "foreign metrics, report": (lambda: Path(OUT, "metrics.json").write_text("{}"), REPORT, "metrics.json|--phase all"),
    "missing part, fusing": (lambda: Path(CNN).unlink(), f"--demo {FUSE}", f"{CNN}|--run-models"),
    "truncated part, fusing": (lambda: cut(Path(CNN), 5000), f"--demo {FUSE}", f"{CNN}|--run-models"),
    "foreign part, fusing": (lambda: torch.save([1], CNN), f"--demo {FUSE}", f"{CNN}|--run-models"),
    "hostile cache": (lambda: Path(CACHE).write_bytes(pickle.dumps(Hostile())), "--demo", f"{CACHE}|--output-dir"),
    "truncated cache": (lambda: cut(Path(CACHE), 100), "--demo", f"{CACHE}|--output-dir"),
    "BERT folder without weights": (lambda: touch("bert", "config.json"), "--ravdess-path CORPUS --bert-model bert",
                                    "--bert-model bert|--run-models cnn,rnn,fusion_rnn"),
    "BERT name and no hub": (nothing, "--ravdess-path CORPUS --bert-model nobody/nothing",
                             "--bert-model nobody/nothing|--bert-model FOLDER|--run-models cnn,rnn,fusion_rnn"),
    "Whisper of text": (lambda: touch(".", "base.pt"),
                        "--ravdess-path CORPUS --phase data --no-use-simulated-sentences --whisper-model base.pt",
                        "--whisper-model base.pt"),
    "Whisper of others": (foreign_whisper,
                          "--ravdess-path CORPUS --phase data --no-use-simulated-sentences --whisper-model foreign.pt",
                          "--whisper-model foreign.pt"),
}


@pytest.mark.parametrize("case", ONE_SENTENCE)
def test_bad_input_ends_with_one_sentence_and_nothing_lost(case, copied, monkeypatch):
    prepare, argv, named = ONE_SENTENCE[case]
    if "own" in argv.split():
        shutil.copytree(CORPUS, "own")
    prepare(monkeypatch) if prepare in (no_gpu, full_disk, broken_torchaudio) else prepare()
    before = snapshot("outputs")
    argv = argv.replace("CORPUS", str(CORPUS)).split()
    with pytest.raises(er.UserError) as stop:
        er.main([*(["--demo"] if case == "demo with a corpus" else []), *argv, *(DEMO[1:] if "report" not in case else [])])
    missing = [words for words in named.split("|") if words not in str(stop.value)]
    assert not missing and "\n" not in str(stop.value), str(stop.value)
    after = snapshot("outputs")
    assert {path: after.get(path) for path in before} == before and not Path("executed").exists()


@pytest.mark.parametrize(("argv", "named"), [("--epoch-cnn 3", "--epoch-cnn"), ("--ravdess-path nowhere", "nowhere"),
                                             ("", "--demo")], ids=["mistyped flag", "no such path", "no corpus"])
def test_the_command_line_ends_with_exit_code_2_and_one_line(argv, named):
    done = run_script(*argv.split())
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr


# ---------------------------------------------------------------------------------------------- the real corpus
ROOT, REAL = Path.cwd(), os.environ.get("RAVDESS_PATH", "")  # tests change the folder


@pytest.mark.skipif(not REAL, reason="set RAVDESS_PATH to the folder of the real corpus")
def test_real_corpus_is_complete_and_its_quiet_clips_survive():
    clips, audit = er.index_clips(ROOT / REAL)
    audit = er.complete_audit(er.split_clips(clips, config()), audit)
    assert len(clips) == 1440 and audit["missing"] == [] and audit["left_out"] == {}
    assert audit["per_emotion"] == {emotion: 96 if emotion == "neutral" else 192 for emotion in er.EMOTIONS}
    assert ["03-01-03-01-02-01-07", "03-01-03-01-02-02-07"] in audit["same_bytes"]
    two = clips[clips["actor"].isin([9, 20])]
    peaks = two["path"].map(lambda path: np.abs(soundfile.read(path)[0]).max() * 32768)
    mels = er.in_parallel(lambda path: er.prepare_clip(path, config()), two["path"], "")
    assert (peaks < 300).sum() == 10 and [mel for mel in mels if isinstance(mel, str)] == []
    assert min(len(mel) for mel in mels) > 40  # 0.65 s of speech at least


# ---------------------------------------------------------------------------------------------- speed
def seconds_of(function):
    """The best of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.benchmark
def test_features_take_a_fifth_of_the_time_of_librosa():
    import librosa
    rng = np.random.default_rng(0)
    for index in range(60):
        wave = np.resize(er.synthesize(er.EMOTIONS[index % 8], index, rng, 48000), round(3.7 * 48000))
        written(f"{index}.wav", wave, 48000)
    paths = sorted(Path().glob("*.wav"))

    def with_librosa():
        for path in paths:
            samples, rate = librosa.load(path, sr=16000)
            librosa.feature.melspectrogram(y=samples, sr=rate)

    def with_product(cfg):
        assert not [mel for mel in er.in_parallel(lambda path: er.prepare_clip(path, cfg), paths, "") if isinstance(mel, str)]
    librosa.load(paths[0], sr=16000)  # its first call imports and compiles
    theirs = seconds_of(with_librosa)
    for text in ("1", er.SPEEDS):
        ours = seconds_of(functools.partial(with_product, config(speeds=text)))
        print(f"\nfeatures, speeds {text}: {1000 * ours / 60:.1f} ms a clip, librosa {1000 * theirs / 60:.1f} ms, "
              f"{theirs / ours:.1f} times as fast")
        assert ours <= theirs / 5


@pytest.mark.benchmark
def test_training_is_no_slower_than_a_plain_loop(demo):
    cfg, clips = demo
    clips = pd.concat([clips] * 4, ignore_index=True)
    settings_cnn = er.settings_for(cfg, "cnn")
    model = er.build_model("cnn", clips, cfg, "cpu").train()
    trainer = er.Trainer(model, settings_cnn, 1000, None, "cpu")
    loader = er.batches_of(er.make_dataset(model, clips, cfg, "cpu", augment=True), cfg.batch_size, shuffle=True)
    plain = er.build_model("cnn", clips, cfg, "cpu").train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    class OneByOne(torch.utils.data.Dataset):
        """What a student writes: clip by clip, float32, padded or cut."""

        def __len__(self):
            return len(clips)

        def __getitem__(self, row):
            mel = torch.from_numpy(np.array(clips["mel"][row][:, 0], dtype=np.float32).T)[:, :160]
            return F.pad(mel, (0, 160 - mel.shape[1]))[None], er.EMOTIONS.index(clips["emotion"][row])

    def with_product():
        for batch in loader:
            trainer.step(batch)

    def with_plain_loop():
        for mel, label in torch.utils.data.DataLoader(OneByOne(), cfg.batch_size, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(plain({"mel": mel}), label).backward()
            optimizer.step()
    ours, theirs = seconds_of(with_product), seconds_of(with_plain_loop)
    print(f"\ntraining: {len(clips) / ours:.0f} clips a second with augmentation, plain float32 loop without "
          f"{len(clips) / theirs:.0f}, ratio {theirs / ours:.2f}; peak memory "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    assert ours < 1.5 * theirs
