"""Train the SpeechEncoder that comes with the file, on all clips of RAVDESS.

    python archive/head.py [flags of the script, such as --ravdess-path FOLDER]

Writes archive/SpeechEncoder_best.pth, with which `python emotion_recognition.py --input me.wav` answers where
nothing was trained. Temperature and threshold of "unsure" come from leave-one-actor-out: each actor is
heard by a head that was fitted on the 23 others, and the UAR of these answers is printed. Features lie in
OUTPUT_DIR/cache. The head names Whisper's encoder by the digest of its weights and does not hold them.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

TARGET = Path(__file__).absolute().with_name("SpeechEncoder_best.pth")
ASKED = "ravdess_path", "download", "output_dir", "device", "seed", "whisper_model", "speech_c"
MADE = "{}.{} ".format(*sys.version_info) + er.code_of("speech")  # Python, key of the code in it
CAVEAT = "SpeechEncoder that comes with this file, trained on all actors of RAVDESS (CC BY-NC-SA 4.0)"


def fit_head(clips, held_out, cfg, device):
    """A SpeechEncoder fitted on all clips but those of the actors held out."""
    splits = np.where(clips["actor"].isin(held_out), "validation", "train")
    model, _ = er.train(er.SpeechEncoder, {}, clips.assign(split=splits), cfg, device, None, {})
    return model


def leave_one_actor_out(clips, windows, cfg, device):
    """Log-probabilities (V, W, C) of all windows, each by a head that never heard its actor."""
    log_probs = torch.empty(len(er.SpeechEncoder.views), len(windows), len(er.EMOTIONS))
    for actor in sorted(set(clips["actor"])):
        print(f"Without actor {actor}", flush=True)
        own = (windows["actor"] == actor).to_numpy(copy=True)
        log_probs[:, own] = er.infer(fit_head(clips, [actor], cfg, device), windows[own], cfg, device)
    return log_probs


def main(argv):
    """Write the checkpoint; flags as on the command line of the script."""
    cfg = er.parse_settings(argv)
    er.refuse_idle(cfg, ASKED, f"{TARGET.name}, trained on all of RAVDESS,")
    device, corpus = er.pick_device(cfg), er.read_corpus(cfg)
    clips = corpus.clips.assign(split="validation")
    windows = er.windows_of(clips, cfg)
    log_probs = leave_one_actor_out(clips, windows, cfg, device)
    model = fit_head(clips, [], cfg, device)

    # Settings as the file has them: where clips and weights lie on this machine is nobody's business. Code
    # has another key in each version of Python, so it has none here.
    usual = er.parse_settings([])._asdict()
    private = "ravdess_path", "whisper_model", "output_dir", "device", "given"
    public = cfg._asdict() | {key: usual[key] for key in private}
    traits = windows[["clip", "split", "emotion", "voiced", "digest"]].astype({"emotion": str})
    checkpoint = er.Checkpoint(
        "speech", model.spec, model.state_dict(), er.classes_of(clips), "", (CAVEAT,), public,
        er.fingerprint_of(cfg, "speech", clips) | {"code": "", "made": MADE}, [], traits.to_dict("list"),
        log_probs)
    with er.replacing(TARGET) as temporary:
        torch.save(checkpoint._asdict(), temporary)

    # Not a figure of a test: validation has chosen temperature and threshold.
    calibration = er.calibrate({"speech": checkpoint}, cfg)
    answers = er.predict({"speech": log_probs}, windows, calibration, cfg)
    table = er.predictions_table(answers, clips, er.EMOTIONS)
    print(er.score(table, er.EMOTIONS, ["system"]).T.to_string())
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
