"""Many runs at once, on this machine or on a cluster: what emotion_recognition.py does one after the other.

    python archive/jobs.py --jobs 2 -- --folds 0,1,2,3,4 --runs 3         on this machine, two at a time
    python archive/jobs.py --scheduler tcp://host:8786 -- --folds 0,1     on the workers of a Dask cluster

Each run is the command after -- with --only-run, in a process of its own; what it says stands in its folder,
in log.txt. Threads and GPUs of this machine are divided among them. Workers (dask worker --nthreads 1) need
the packages, the corpus and OUTPUT_DIR at the same path. At the end the command makes its results of all
runs. Ctrl-C stops all of them after their last finished epoch; the same command goes on from there.
"""

import argparse
import contextlib
import functools
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import joblib

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))
import emotion_recognition as er

PIP = 'pip install "dask[distributed]"'


def run_apart(command, folder, beacon, environment):
    """Run a command in a folder as long as the file `beacon` is there: its exit code and its last words."""
    if not os.path.exists(beacon):  # noqa: PTH110, workers get this function and nothing else
        return 2, f"{beacon} is not there, or no longer"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", cwd=folder, env=os.environ | environment)
    while True:
        try:
            words, _ = process.communicate(timeout=0.5)
            return process.returncode, re.split(r"[\r\n]+", words.strip())[-1]
        except subprocess.TimeoutExpired:
            if not os.path.exists(beacon):  # noqa: PTH110
                process.terminate()


def command_of(flags, place, *more):
    """The command line that trains the run at a place, from 0 on."""
    return [sys.executable, er.__file__, *flags, f"--only-run={place + 1}", *more]


def share_of(place, jobs):
    """The environment variables that give the run at a place its share of this machine."""
    there = ",".join(map(str, range(er.torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", there).split(",")
    threads = os.environ.get("OMP_NUM_THREADS", max(1, os.cpu_count() // jobs))
    return {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}


def cluster_of(scheduler, call):
    """A client of a Dask cluster each of whose workers answers `call` with exit code 0. Raises UserError."""
    distributed = er.load_package("dask.distributed", PIP)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it logs what is raised as well
    try:
        client = distributed.Client(scheduler, timeout=10)
        client.get_versions(check=True)
        asked = {worker: client.submit(call, workers=worker, pure=False) for worker in client.ncores()}
        answers = client.gather(asked)
    except Exception as error:  # Dask has many kinds
        raise er.UserError(f"--scheduler {scheduler} cannot be used ({error}): it and its workers need the "
                           "Python, Dask and files of this machine") from error
    problems = {f"the worker {worker} cannot do a run: {words}": code
                for worker, (code, words) in answers.items()}
    problems[f"--scheduler {scheduler} has no workers: dask worker {scheduler} --nthreads 1"] = not answers
    if any(problems.values()):
        client.close()
    er.refuse(problems)
    return client


def train_all(runs, flags, beacon, asked):
    """Train all runs, several at once, with one bar; {folder: last words} of those that failed."""
    here, places = functools.partial(run_apart, folder=str(Path.cwd()), beacon=str(beacon)), range(len(runs))
    if asked.scheduler:
        check = functools.partial(here, command_of(flags, 0, "--phase=data"), environment={})
        cluster, backend = cluster_of(asked.scheduler, check), {"backend": "dask"}
        shares = [{}] * len(runs)
    else:
        cluster, backend = contextlib.nullcontext(), {"backend": "threading", "n_jobs": asked.jobs}
        shares = [share_of(place, asked.jobs) for place in places]
    tasks = [joblib.delayed(here)(command_of(flags, place), environment=shares[place]) for place in places]
    try:
        with cluster, joblib.parallel_config(**backend):
            ended = joblib.Parallel(return_as="generator", pre_dispatch="all")(tasks)
            ended = list(er.tqdm(ended, "Runs", len(runs)))
    except Exception as error:  # of Dask's: workers that die, a scheduler that goes away
        raise er.UserError(f"runs were lost ({error}): what is finished is kept, the same command "
                           "goes on from there") from error
    return {run.output_dir: words for run, (code, words) in zip(runs, ended) if code}


def main(argv):
    """Train the runs of a command and make its results. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at once (default: 1)")
    parser.add_argument("--scheduler", default="", help="of Dask, tcp://host:8786; without: this machine")
    parser.add_argument("flags", nargs="*", help="flags of emotion_recognition.py, after --")
    asked = parser.parse_args(argv)
    cfg = er.parse_settings(asked.flags)
    runs = er.runs_of(cfg)
    er.refuse({
        f"--jobs {asked.jobs} is none of 1 to {len(runs)}, as many runs as --folds and --runs make":
            not 1 <= asked.jobs <= len(runs),
        "--only-run is what this script decides: leave it out": cfg.only_run,
        f"--phase {cfg.phase} trains nothing: leave it out": cfg.phase not in ("all", "unimodal", "fusion")})

    # What all runs share is made once: the corpus of --demo or --download, Whisper's transcripts.
    er.main([*asked.flags, "--phase=data"])
    beacon = Path(cfg.output_dir, f".jobs_{os.getpid()}")
    beacon.touch()
    try:
        failed = train_all(runs, asked.flags, beacon, asked)
    except KeyboardInterrupt:
        beacon.unlink()
        time.sleep(2)  # until those at work have seen it
        raise
    finally:
        beacon.unlink(missing_ok=True)
    er.refuse({f"{len(failed)} of {len(runs)} runs failed, the others are kept: "
               f"{'; '.join(map(': '.join, failed.items()))}": failed})
    er.main(asked.flags)


if __name__ == "__main__":
    er.run_script(main, sys.argv[1:])
