"""What the hardware could do, to set what it does beside it: peak arithmetic, and memory. No torch here."""

import resource

# Dense bf16 operations per second, from the makers' data sheets.
BF16_PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def bf16_peak(device_name: str) -> float | None:
    """Return the peak of a device by its name, None if it is not one we know."""
    return next((peak for part, peak in BF16_PEAK.items() if part in device_name), None)


def process_memory() -> int:
    """Return the most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int | None:
    """Return the bytes that programs can still take without swapping, None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
    except OSError:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
