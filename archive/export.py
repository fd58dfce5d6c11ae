"""Write AudioCNN as ONNX, for programs without torch: samples in, probabilities out.

    python archive/export.py --output-dir outputs     leaves outputs/AudioCNN.onnx and says how to ask it
    pip install onnxscript onnxruntime                what it needs; the latter to compare it with Predictor

SpeechEncoder cannot be written: it hears with all of Whisper's encoder, at speeds that need a resampler.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

PACKAGES = "pip install --upgrade onnxscript onnxruntime"
ABOUT = """\
In: samples, float32 (recordings, length), mono at {cfg.sampling_rate} Hz, {least} and more, at any level, run
through the high-pass. Out: probabilities, float32 (recordings, classes); metadata name the classes.
Trimming, pauses, log-mels, views and temperature are inside. Of what is said the middle is heard: cut what
is longer than {er.LONGEST:g} s, of which Predictor averages windows. Silence and noise have an answer too.

session = onnxruntime.InferenceSession("AudioCNN.onnx")
sos = json.loads(session.get_modelmeta().custom_metadata_map["high_pass"])
(answer,) = session.run(None, {{"samples": np.float32([scipy.signal.sosfiltfilt(sos, samples)])}})"""


class FromSamples(torch.nn.Module):
    """AudioCNN with all that `er.load_clip`, `er.ClipDataset` and `er.predict` do for it, in tensors."""

    def __init__(self, predictor):
        super().__init__()
        self.cfg, self.model = predictor.cfg, er.restore(predictor.checkpoints["cnn"])
        self.views, self.temperature = er.VIEWS[:self.cfg.test_views], predictor.calibration["cnn"]
        window, self.bank = er.window_and_bank(self.cfg.sampling_rate, self.cfg.n_fft, self.cfg.n_mels)
        waves = torch.fft.rfft(window.diag())  # (N_FFT, F)
        self.waves = torch.cat([waves.real, waves.imag], dim=1).T[:, None]  # (2 F, 1, N_FFT), to convolve

    def forward(self, samples):
        """Samples (B, n) -> probabilities (B, C)."""
        spectrum = torch.conv1d(samples[:, None], self.waves, None, self.cfg.hop_length, self.cfg.n_fft // 2)
        power = self.bank.T @ spectrum.square().unflatten(1, (2, -1)).sum(dim=1)  # (B, M, all)
        kept, top = self.kept_frames(10 * torch.log10(power.sum(dim=1).clamp(min=1e-20)).T)
        mel = torch.log(power * 10 ** (-top[:, None, None] / 10) + er.FLOOR).half().float()  # as in clips
        heard = torch.cat([self.read(mel, kept, *view) for view in self.views])  # (V * B, 1, M, T)
        log_probs = self.model({"mel": heard}).log_softmax(dim=1).unflatten(0, (len(self.views), -1))
        return (log_probs.mean(dim=0) / self.temperature).softmax(dim=1)

    def kept_frames(self, level):
        """Levels (all, B) in dB -> frames with margins (all, B), loudest speech (B,), as `er.loud_frames`."""
        second, trim = self.cfg.sampling_rate / self.cfg.hop_length, self.cfg.trim_db
        half = round(0.13 * second)
        steady = around(level, 2 * half + 1).topk(half + 1, dim=1).values[:, -1]  # the median
        top, near = steady.amax(dim=0), around(steady, round(2 * second)).amax(dim=1)
        faint = near.maximum(top - 10) - trim
        noise = torch.minimum(steady.amin(dim=0) + 6, top + 10 - trim)
        loud = (near >= top - trim) & (steady >= faint) & (steady >= noise)
        place = torch.arange(level.shape[0])[:, None]
        first, last = torch.where(loud, place, place[-1]).amin(dim=0), (loud * place).amax(dim=0)
        kept = around(loud, round(second / 4)).any(dim=1)
        return kept & (place >= first - 0.05 * second) & (place <= last + 0.1 * second), top

    def read(self, mel, kept, speed, tempo):
        """The middle (B, 1, M, T) of the kept frames of log-mels (B, M, all), as `er.ClipDataset.windows`."""
        frames, bands, step = er.window_frames(self.cfg), self.cfg.n_mels, speed * tempo
        length = kept.sum(dim=0)
        start = (length - frames * step) / 2
        start = start.floor() if step == 1 else start  # the plain view needs no interpolation
        time = (start + step * torch.arange(frames)[:, None]).clamp(min=0).minimum(length - 1)  # (T, B)
        band = er.bands_heard(torch.tensor([[speed]]), bands, self.cfg.sampling_rate)[0].clamp(-1, 1)
        in_band = share((band + 1) / 2 * (bands - 1), torch.arange(bands))  # (M, M)
        in_time = share(kept.cumsum(dim=0).T - 1, time.T)  # (B, all, T)
        return (in_band @ (mel * kept.T[:, None]) @ in_time)[:, None]


def around(x, size):
    """Each of x (N, B) with those around it, mirrored at the ends as in scipy: (N, size, B)."""
    count = x.shape[0]
    place = torch.arange(count)[:, None] + torch.arange(size) - size // 2
    place = place.maximum(-1 - place)
    return x[place.minimum(2 * count - 1 - place).clamp(min=0)]


def share(places, others):
    """How much two places share in linear interpolation: (..., N) and (..., K) -> (..., N, K)."""
    return (1 - (places[..., None] - others[..., None, :]).abs()).clamp(min=0)


def export(predictor):
    """An ONNXProgram of a Predictor's AudioCNN that says what must be known of it. Raises UserError."""
    cfg, least = predictor.cfg, er.LEAST * predictor.cfg.hop_length
    free = {0: torch.export.Dim("recordings"), 1: torch.export.Dim("length", min=least)}
    try:
        program = torch.onnx.export(
            FromSamples(predictor).eval(), (torch.zeros(2, 10 * least),), dynamic_shapes=[free], dynamo=True,
            input_names=["samples"], output_names=["probabilities"], opset_version=18, verbose=False)
    except Exception as error:  # exporters raise many kinds
        raise er.UserError(f"torch {torch.__version__} and onnxscript do not fit: {PACKAGES}") from error
    program.model.doc_string = ABOUT.format(cfg=cfg, least=least, er=er)
    program.model.metadata_props.update({
        "classes": json.dumps(predictor.classes),
        "temperature": str(predictor.calibration["cnn"]),
        "sampling_rate": str(cfg.sampling_rate),
        "high_pass": json.dumps(er.high_pass(cfg.sampling_rate).tolist()),  # sections, run both ways
        "licence": "that of its corpus" if cfg.manifest or cfg.demo else "CC BY-NC-SA 4.0, as RAVDESS",
        "caveats": "; ".join(predictor.caveats),
        "version": f"{er.__version__}, training {er.digest(predictor.checkpoints['cnn'].fingerprint)}"})
    return program


def largest_difference(path, predictor):
    """How far probabilities for a synthetic voice lie from Predictor's at most. Raises UserError."""
    runtime = er.load_package("onnxruntime", f"{PACKAGES} to compare", "InferenceSession")
    rate, predictor.gate = predictor.cfg.sampling_rate, lambda *heard: (True, "")
    voice = er.synthesize("happy", 1, np.random.default_rng(0), rate)
    samples, _ = er.load_samples(voice, predictor.cfg, rate)
    try:
        ((answer,),) = runtime.InferenceSession(path).run(None, {"samples": samples[None]})
    except Exception as error:  # it has many kinds
        raise er.UserError(f"onnxruntime {runtime.__version__} cannot read the file: {PACKAGES}") from error
    return (predictor.predict(voice, rate).loc["AudioCNN", predictor.classes] - answer).abs().max()


def main(argv):
    """Write the file; flags as on the command line of the script. Raises UserError."""
    cfg = er.parse_settings([*argv, "--phase=predict"])
    er.refuse_idle(cfg, ("phase", "demo", "output_dir", "test_views", "device"), "an ONNX file")
    er.load_package("onnxscript", PACKAGES)
    models, path = Path(cfg.output_dir).glob("*_best.pth"), er.file_of(cfg, "cnn", ".onnx")
    er.refuse({f"{cfg.output_dir} holds no AudioCNN, which alone can be written: train it with --run-models "
               "cnn": any(models) and not er.file_of(cfg, "cnn").exists()})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, in vain
    warnings.simplefilter("ignore")  # of torch, about itself
    predictor, gap = er.Predictor(cfg.output_dir, test_views=cfg.test_views), np.nan
    with er.replacing(path) as temporary:
        program = export(predictor)
        program.save(temporary)
        with er.only_warning():
            gap = largest_difference(temporary, predictor)
        er.refuse({f"{path} would answer otherwise, by up to {gap:.1g}: {PACKAGES}": gap > 1e-4})
    print(f"{path}: largest difference to Predictor {gap:.0e}", program.model.doc_string, sep="\n\n")


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
