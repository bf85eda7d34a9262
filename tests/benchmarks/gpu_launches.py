"""Kernels and copies of one step on the card, as torch's profiler sees them: a check of what tests/launches.py counts.

    python tests/benchmarks/gpu_launches.py

Every side of bench_gpu_step.py and bench_gpu_gpt2.py runs in a process of its own; the profiler listens to the driver, so it
should see CuPy's launches, too. With --device cpu there is nothing to see: it shows that the script runs.
"""

import argparse
import concurrent.futures
import functools
import json
import subprocess
import sys

import bench_gpu_gpt2
import bench_gpu_step
from alternate import environment


def sides(device, quick):
    both = {f"main job: {name}": setup for name, setup in bench_gpu_step.sides(device, quick).items() if "alone" not in name}
    return both | {f"GPT-2: {name}": setup for name, setup in bench_gpu_gpt2.sides(device, quick).items()
                   if "recorded" not in name and "graph" not in name}  # the same launches: in seconds in all


def profiled(setup):
    """Numbers of kernels, and of copies and fills, in the fourth step."""
    import torch
    run = setup()
    run(3)
    activity = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run(1)
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return {"kernels": len(names) - len(copies), "copies and fills": len(copies)}


def counted(options, name):
    """What `profiled` finds in a process of its own, or None."""
    command = [sys.executable, __file__, "--device", options.device, "--worker", name, *["--quick"] * options.quick]
    child = subprocess.run(command, env=environment(), text=True, stdout=subprocess.PIPE)
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--quick", action="store_true", help="a tiny GPT-2")
    parser.add_argument("--only", metavar="TEXT", default="", help="only sides with TEXT in their name")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = sides(options.device, options.quick)
    if options.worker:
        print("\n" + json.dumps(profiled(known[options.worker])))
        return 0
    found = {}
    chosen = [name for name in known if options.only in name]
    with concurrent.futures.ThreadPoolExecutor(4) as four:  # nothing is timed, so some may run side by side
        for name, numbers in zip(chosen, four.map(functools.partial(counted, options), chosen)):
            found[name] = numbers
            print(f"{name:<60}{numbers or 'stopped: its message is above'}", flush=True)
            if options.json:
                with open(options.json, "w", encoding="utf-8") as file:
                    json.dump(found, file, indent=1)
    return int(None in found.values())


if __name__ == "__main__":
    sys.exit(main())
