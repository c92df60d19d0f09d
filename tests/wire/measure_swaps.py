"""measure_swaps.py [--swaps N]: what swapping the safety adapters costs the pictures that are drawn meanwhile, and the process's memory, on the real daemon.

Each picture is a single step, so that its time in the UNet is the time of one step, the first with a new generation included. Prints the median, the
99th percentile and the largest without swaps and with one swap after another; and the resident memory before the first swap and after every tenth of
them, with what the second half of the swaps added. Leave the machine alone meanwhile.
"""
import argparse
import pathlib
import statistics
import tempfile
import threading
import time

from adapters import Policy, lora
from conftest import QUICK, Daemon
from test_safety_swap import reload

STEP = {**QUICK, "steps": 1, "size": "128x128"}


def resident_mb(d):
    status = pathlib.Path(f"/proc/{d.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def say(what, ms):
    ms = sorted(ms)
    print(f"{what:16} {len(ms):6} steps: median {statistics.median(ms):6.2f} ms, 99 % {ms[len(ms) * 99 // 100]:6.2f}, largest {ms[-1]:6.2f}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--swaps", type=int, default=1000)
    swaps = ap.parse_args().swaps
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(pathlib.Path(folder) / "policy")
        for seed, name in enumerate("ab"):
            policy.adapter(name, lora(seed))
        d = Daemon(pathlib.Path(folder), policy=policy.profile(required=["a"]).write().path)
        try:
            times = {"without swaps": [], "with swaps": []}
            now, over = ["without swaps"], threading.Event()

            def draw():
                while not over.is_set():
                    kind = now[0]
                    ms = d.post(STEP).json["safelight"]["times"]["unet_ms"]
                    if kind == now[0]:
                        times[kind].append(ms)

            for _ in range(20):
                d.post(STEP)
            client = threading.Thread(target=draw)
            client.start()
            time.sleep(min(20, swaps / 10))
            now[0] = "with swaps"
            begun, resident = time.monotonic(), [resident_mb(d)]
            for i in range(swaps):
                reload(d, policy.profile(required=["ab"[(i + 1) % 2]]))
                if (i + 1) % max(1, swaps // 10) == 0:
                    resident.append(resident_mb(d))
            seconds = time.monotonic() - begun
            over.set()
            client.join()
            for what, ms in times.items():
                say(what, ms)
            print(f"{swaps} swaps in {seconds:.0f} s; resident MB before and after every tenth: {' '.join(f'{mb:.1f}' for mb in resident)}")
            print(f"the second half added {resident[-1] - resident[len(resident) // 2]:+.1f} MB")
            d.stop()
        finally:
            d.kill()


if __name__ == "__main__":
    main()
