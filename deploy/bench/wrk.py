"""Ask with wrk, a load generator for HTTP: one thread, many connections, each asking again as soon as it is answered (a closed load).

wrk is a package of the system and in no wheel: root on Debian and Ubuntu gets it by itself, others install it or do without
(`deploy/bench/load.py` asks instead, at a higher price).
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

INSTALL_TIMEOUT_S = 120

_SCRIPT = """-- Made by deploy/bench/wrk.py: ask whole requests, one after the other, and count the answers by level of the cache.
local requests, place, threads = {}, 0, {}
local levels = {"l1", "l2", "l3", "semantic", "miss", "none"}

function setup(thread) table.insert(threads, thread) end

function init(args)
  for line in io.lines(%s) do
    local key, path, body = line:match("^(%%S+)\\t(%%S+)\\t(.*)$")
    local headers = {["authorization"] = "Bearer " .. key, ["content-type"] = "application/json"}
    requests[#requests + 1] = wrk.format("POST", path, headers, body)
  end
  for _, level in ipairs(levels) do _G["level_" .. level] = 0 end
  answered = 0
end

function request()
  place = place %% #requests + 1
  return requests[place]
end

function response(status, headers, body)
  if status == 200 then
    answered = answered + 1
    local name = "level_" .. (headers["x-aiscale-cache"] or "none")
    _G[name] = _G[name] + 1
  end
end

function done(summary, latency, rates)
  local counts = {}
  for _, level in ipairs(levels) do counts[level] = 0 end
  local answered = 0
  for _, thread in ipairs(threads) do
    answered = answered + thread:get("answered")
    for _, level in ipairs(levels) do counts[level] = counts[level] + thread:get("level_" .. level) end
  end
  local function show(name, value) io.write(string.format("RESULT %%s %%d\\n", name, value)) end
  show("answered", answered)
  show("requests", summary.requests)
  show("duration_us", summary.duration)
  for _, kind in ipairs({"connect", "read", "write", "status", "timeout"}) do show("error." .. kind, summary.errors[kind]) end
  for _, percent in ipairs({50, 95, 99}) do show("p" .. percent, latency:percentile(percent)) end
  for level, count in pairs(counts) do show("level." .. level, count) end
end
"""


@dataclass
class WrkResult:
    """Hold what wrk saw."""

    answered: int
    """Answers with status 200."""
    elapsed_s: float
    percentiles_ms: dict[int, float]
    errors: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        return self.answered / max(self.elapsed_s, 1e-9)

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def find_wrk() -> str | None:
    """Return wrk's path; where it is missing and we may, install it first. I/O: the system's packages, once."""
    if shutil.which("wrk") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing wrk with apt-get ...", flush=True)
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "wrk"]):
            try:
                subprocess.run(
                    ["apt-get", *step], check=False, capture_output=True, env=environ, timeout=INSTALL_TIMEOUT_S
                )
            except subprocess.TimeoutExpired:
                break
    return shutil.which("wrk")


def run_wrk(
    wrk: str, url: str, orders: list[tuple[str, str, bytes]], *, clients: int, seconds: float, timeout_s: float = 10
) -> WrkResult:
    """Ask ``orders`` (key, path, JSON body) in turn, again and again. I/O: a process of its own, whose CPU counts as this one's."""
    with tempfile.TemporaryDirectory() as place:
        listed, script = Path(place) / "requests.tsv", Path(place) / "script.lua"
        listed.write_bytes(b"".join(f"{key}\t{path}\t".encode() + body + b"\n" for key, path, body in orders))
        script.write_text(_SCRIPT % json.dumps(str(listed)), encoding="utf-8")
        command = [wrk, "-t1", f"-c{clients}", f"-d{max(round(seconds), 1)}s", f"--timeout={timeout_s:.0f}s"]
        done = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    seen = {name: int(value) for _, name, value in lines}
    if "duration_us" not in seen:
        raise SystemExit(f"wrk failed:\n{done.stdout[-500:]}{done.stderr[-500:]}")

    def pick(prefix: str) -> Counter[str]:
        return Counter({name.removeprefix(prefix): n for name, n in seen.items() if name.startswith(prefix) and n})

    return WrkResult(
        answered=seen["answered"],
        elapsed_s=seen["duration_us"] / 1e6,
        percentiles_ms={percent: seen[f"p{percent}"] / 1000 for percent in (50, 95, 99)},
        errors=pick("error."),
        levels=pick("level."),
    )
