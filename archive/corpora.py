"""A table for --manifest from the file names of CREMA-D, TESS, SAVEE or EMO-DB.

    python archive/corpora.py crema-d FOLDER > crema-d.csv     likewise tess, savee and emo-db
    python emotion_recognition.py --manifest crema-d.csv --output-dir outputs/crema-d

A row for each clip under FOLDER, with path, emotion, speaker and, where its name tells it, transcript. Paths
are absolute, so that the table can lie anywhere. What was found and passed over is said on stderr. The table
is UTF-8, of which Windows PowerShell would make UTF-16: use the command prompt there.
"""

import argparse
import csv
import io
import re
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))

# Each is said in every emotion, so they tell next to nothing of it; the first is said at three intensities,
# and so more often, in all but neutral.
CREMA_D_SENTENCES = {
    "ieo": "It's eleven o'clock",
    "tie": "That is exactly what happened",
    "iom": "I'm on my way to the meeting",
    "iww": "I wonder what this is about",
    "tai": "The airplane is almost full",
    "mti": "Maybe tomorrow it will be cold",
    "iwl": "I would like a new alarm clock",
    "ith": "I think I have a doctor's appointment",
    "dfa": "Don't forget a jacket",
    "its": "I think I've seen this before",
    "tsi": "The surface is slick",
    "wsi": "We'll stop in a couple of minutes",
}

# Names are read in lower case, since copies of a corpus differ in capitals. Files with the same groups are
# copies of one clip. `transcript` makes a sentence of the group `words`.
Corpus = namedtuple("Corpus", "example name emotions speakers transcript", defaults=[{}, None])
CORPORA = {
    "crema-d": Corpus(
        example="1001_DFA_ANG_XX.wav",
        name=r"(?P<speaker>\d{4})_(?P<words>[a-z]{3})_(?P<emotion>[a-z]{3})_([a-z]+)",
        emotions={"ang": "angry", "dis": "disgust", "fea": "fearful", "hap": "happy",
                  "neu": "neutral", "sad": "sad"},
        transcript=CREMA_D_SENTENCES.get,
    ),
    "tess": Corpus(
        example="OAF_back_angry.wav",
        name="(?P<speaker>oaf|oa|yaf)_(?P<words>[a-z]+)_(?P<emotion>[a-z]+)",
        emotions={"angry": "angry", "disgust": "disgust", "fear": "fearful", "happy": "happy",
                  "neutral": "neutral", "ps": "surprised", "sad": "sad"},
        speakers={"oa": "OAF"},  # OA_bite_neutral.wav
        transcript="Say the word {}.".format,
    ),
    "savee": Corpus(
        example="DC_a01.wav or DC/a01.wav",
        name=r"(?P<speaker>dc|je|jk|kl)[_/](?P<emotion>[a-z]+)(\d+)",
        emotions={"a": "angry", "d": "disgust", "f": "fearful", "h": "happy",
                  "n": "neutral", "sa": "sad", "su": "surprised"},
    ),
    "emo-db": Corpus(
        example="03a01Wa.wav",
        name=r"(?P<speaker>\d\d)([ab]\d\d)(?P<emotion>[a-z])([a-z])",
        # Wut, Langeweile, Ekel, Angst, Freude, Trauer
        emotions={"w": "angry", "l": "bored", "e": "disgust", "a": "fearful", "f": "happy",
                  "t": "sad", "n": "neutral"},
    ),
}


def read_name(path, corpus):
    """(what tells a clip from others, its row of the table); None twice if the name is not the corpus's."""
    place = path.as_posix()
    name = re.search(f"/{corpus.name}[.]wav$", place.lower())
    emotion = name and corpus.emotions.get(name["emotion"])
    if not emotion:
        return None, None

    code = name["speaker"]
    row = [place, emotion, corpus.speakers.get(code, code.upper())]
    if corpus.transcript:
        row.append(corpus.transcript(name["words"]))
    return name.groups(), row


def sort_out(paths, corpus):
    """The rows of the clips among files, the number of second copies, and the files with other names."""
    rows, copies, others = {}, 0, []
    for path in paths:
        clip, row = read_name(path, corpus)
        if not row:
            others.append(path)
        elif clip in rows:
            copies += 1
        else:
            rows[clip] = row
    return list(rows.values()), copies, others


def csv_of(rows):
    """The table as UTF-8 bytes, which no console's encoding and no system's line ends change on the way."""
    columns = ["path", "emotion", "speaker", "transcript"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns[:len(rows[0])])
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def fail(sentence):
    """End with a sentence that says what is wrong."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def main(argv):
    """Write the table that a command asks for to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("folder", help="folder that is searched for the corpus's .wav files")
    asked = parser.parse_args(argv)
    corpus, folder = CORPORA[asked.corpus], Path(asked.folder).absolute()
    advice = f"name a folder with files like {corpus.example}"
    if not folder.is_dir():
        fail(f"{folder} is no folder: {advice}")

    # Not at the top, since it takes seconds: --help and mistakes are answered at once.
    from emotion_recognition import audio_files

    rows, copies, others = sort_out(audio_files(folder), corpus)
    if not rows:
        fail(f"{folder} holds no clips of {asked.corpus.upper()}: {advice}")
    try:
        table = csv_of(rows)
    except UnicodeEncodeError:
        fail(f"{folder} or a name in it is not UTF-8, as the table must be: rename it")

    sys.stdout.buffer.write(table)
    print(f"{len(rows)} clips; second copies passed over: {copies}", file=sys.stderr)
    if others:
        print(f"passed over: {len(others)} files with other names, such as {others[0]}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        fail(error)
