"""A page to speak to: record a sentence or drop a file, and see its emotions. Needs `pip install gradio`.

    python archive/page.py                                http://127.0.0.1:7860, for this machine alone
    python archive/page.py --output-dir outputs/mine      flags of emotion_recognition.py that choose models
    python archive/page.py --host 0.0.0.0 --port 8000     other machines too, which send files: browsers give
                                                          a microphone to 127.0.0.1 and https alone
    %run archive/page.py --share                          Colab, Kaggle: a public address while it runs

A Predictor answers: that of OUTPUT_DIR, else the SpeechEncoder that comes with the script. A recording is
deleted as soon as it is answered.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

CHOOSES_MODELS = {*er.OF_PREDICTOR, "output_dir", "device", "demo"}  # the script's flags that a page takes
MINUTES = er.PART // 60
LARGEST = "30 MB"  # of an upload: these minutes at 48 kHz in 16 bits
NARROW = ".app {max-width: 46rem !important}"  # in CSS: lines that are easy to read
INTRODUCTION = f"""# Emotion in speech
Record a sentence, or choose a file behind the arrow: up to {MINUTES} minutes, {LARGEST}. It is deleted once
it is answered."""
NOTE = """**What this is not.** The models learned from acted speech, by default that of 24 North American
speakers (RAVDESS). They tell what an actor means to show, not what a person feels. They are not fit for
judging people."""


def verdict(first):
    """The first line of a Predictor's table as Markdown: the emotion, and who says so."""
    if first["predicted"] == er.NO_SPEECH:
        question = "Music or noise? " * ("silent" not in first["gate"])
        return f"## no speech\n{question}{first['gate']}"
    emotion = "unsure, perhaps {predicted}" if first["unsure"] else "{predicted}"
    note = " ({note})" * bool(first["note"])
    return f"## {emotion}\n{{model}}{note}. Speech: {{gate}}".format_map(first)


def plot_of(course, classes):
    """A figure of emotion over time, from the table of Predictor.over_time."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    course.index = course[["start", "end"]].mean(axis=1)  # the middle of each window
    axis = course[classes].plot.area(ax=figure.subplots(), colormap="Set2", legend=False, linewidth=0)
    axis.set(title="Emotion over time", xlabel="seconds", ylabel="probability", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def answer(path, predictor):
    """What the page shows of the recording at `path`, which is deleted; None for what there is not.

    Markdown of the verdict or of why there is none, a probability per emotion, words, a plot over time.
    """
    if path is None:  # it was taken away
        return None, None, None, None
    try:
        (samples, rate), *more = itertools.islice(er.sound_parts(path), 2)
        er.refuse({f"it is longer than {MINUTES} minutes": more})
        windows, log_probs = predictor.hear(samples, rate, transcribe=True)
        first = predictor.as_a_whole(windows, log_probs).reset_index().iloc[0]
    except Exception as error:  # decoders, torch and a full memory raise many kinds
        reason = er.printable(str(error) or type(error).__name__)
        return f"## no answer\nThis recording cannot be used: {reason}.", None, None, None
    finally:
        Path(path).unlink(missing_ok=True)

    if not log_probs:
        return verdict(first), None, None, None
    bars = first[predictor.classes].astype(float).to_dict()
    words = windows.get("transcript", [""])[0] or None
    several = len(windows) > 1 and not er.reads_words(predictor.first)
    plot = plot_of(predictor.over_time(windows, log_probs), predictor.classes) if several else None
    return verdict(first), bars, words, plot


def page_of(predictor, gradio):
    """The page, as gradio's Blocks."""
    def shown(path):
        return [gradio.update(value=value, visible=value is not None) for value in answer(path, predictor)]

    with gradio.Blocks(title="Emotion in speech", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gradio.Markdown(INTRODUCTION)
        recording = gradio.Audio(label="Recording", sources=["microphone", "upload"], type="filepath",
                                 buttons=[])  # none that sends it elsewhere
        answers = [
            gradio.Markdown(visible=False),
            gradio.Label(label="Probabilities", show_heading=False, visible=False),
            gradio.Textbox(label="Words that Whisper heard in the first 30 s", visible=False),
            gradio.Plot(show_label=False, format="png", visible=False),
        ]
        gradio.Markdown(f"{NOTE}\n\n{'; '.join(predictor.caveats)}")
        recording.change(shown, recording, answers, api_name="answer", show_progress_on=recording)
    return page


def load_gradio():
    """The package. Raises UserError when it is missing or old."""
    gradio = er.load_package("gradio", "pip install gradio", "Blocks")
    version = tuple(map(int, gradio.__version__.split(".")[:2]))
    er.refuse({f"gradio {gradio.__version__} cannot be told to keep no recordings in the browser: "
               "pip install -U gradio": version < (6, 24)})
    return gradio


def serve(page, asked):
    """Serve the page until it is stopped. Raises UserError when address or port cannot be had."""
    try:
        _, local, public = page.launch(
            server_name=asked.host, server_port=asked.port, share=asked.share, max_file_size=LARGEST,
            run_history=False, footer_links=[], css=NARROW, prevent_thread_lock=True, quiet=True)
    except Exception as error:  # a port in use, a host of others, a proxy
        reason, *_ = str(error).split(". ")
        raise er.UserError(f"--port {asked.port} of --host {asked.host} is in use or cannot be had ({reason}"
                           "): name another") from error
    try:
        er.refuse({"--share got no public address, for which it needs a network: leave it out":
                   asked.share and not public})
        print(f"{public or local} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    finally:
        page.close(verbose=False)


def main(argv):
    """Open the page that a command asks for. Raises UserError."""
    flags = [er.flag_of(key, True) for key in sorted(CHOOSES_MODELS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog=f"Also flags of emotion_recognition.py: {', '.join(flags)}")
    parser.error = functools.partial(er.usage_error, parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    parser.add_argument("--share", action="store_true", help="a public address too, by way of gradio.live")
    asked, others = parser.parse_known_args(argv)
    cfg = er.parse_settings(others)
    er.refuse_idle(cfg, CHOOSES_MODELS, "a page")
    er.refuse({f"--port {asked.port} is not from 1 to 65535": not 1 <= asked.port <= 65535})
    gradio = load_gradio()
    serve(page_of(er.predictor_of(cfg), gradio), asked)


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
