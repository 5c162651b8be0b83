"""How much of what may not go to an endpoint does the content filter find, and what that is none, and how fast?

A thousand prompts are lines of real conversations (``chitchat``) with one planted thing each: of each kind as many,
made here by rules of their own, so that no checksum of the filter's has made them. Whole names come from a list that
the filter has; runs are ten words of rows that it takes for private, of which it knows any eight. Then it looks through
a thousand prompts with nothing in them but numbers that look alike: dates, prices, orders, versions, cards and accounts
with a wrong digit.

    python benchmarks/planted.py --run

keeps what it found in ``results/planted.json``; without ``--run`` it prints the table from there.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from string import punctuation
from typing import Any

from lichen.data.sources.records import load_records
from lichen.fm.filtering.content import ContentFilter, names_in, private_runs
from lichen.fm.filtering.kinds import KINDS
from lichen.fm.filtering.patterns import patterns_of

RESULT = Path(__file__).parent / "results" / "planted.json"
PROMPTS = 1000
FIRST = ("Agneta", "Bao", "Carlos", "Dilek", "Eoin", "Fatima", "Giulia", "Hanno", "Ines", "Jarek", "Kofi", "Leila")
LAST = ("Almqvist", "Brandt", "Castelli", "Demir", "Eriksen", "Fofana", "Gupta", "Horvat", "Ibarra", "Jansen")
Draw = random.Random


def digits(draw: Draw, count: int) -> list[int]:
    """Random digits, the first of which is not 0."""
    return [draw.randint(1, 9), *(draw.randint(0, 9) for _ in range(count - 1))]


def spaced(number: str, every: int, sign: str = " ") -> str:
    """The number in groups."""
    return sign.join(number[at : at + every] for at in range(0, len(number), every))


def mail(draw: Draw) -> str:
    """An address, one in four of a house of its own."""
    host = draw.choice(("example.com", "clinic.example", "uni-ulm.de", "intranet.local", "mail.co.uk"))
    name = draw.choice(FIRST).lower() + draw.choice((".", "_", "")) + draw.choice(LAST).lower()
    return f"{name}{draw.choice(('', '7', '+news'))}@{host}"


def phone(draw: Draw) -> str:
    """A valid number of one of twelve regions, as it is written there or abroad."""
    import phonenumbers as numbers

    region = draw.choice(("US", "GB", "DE", "FR", "IN", "BR", "SE", "IT", "ES", "PL", "NL", "JP"))
    number = numbers.example_number_for_type(region, draw.choice((0, 1)))
    assert number is not None
    base = number.national_number
    for _ in range(50):  # other last digits, as long as it stays valid
        number.national_number = base // 1000 * 1000 + draw.randrange(1000)
        if numbers.is_valid_number(number):
            break
    else:
        number.national_number = base
    return str(numbers.format_number(number, draw.choice((1, 1, 2))))


def luhn(body: list[int]) -> int:
    """The digit that makes Luhn's sum a multiple of ten."""
    total = sum(d if at % 2 else sum(divmod(2 * d, 10)) for at, d in enumerate(reversed(body)))
    return -total % 10


def card(draw: Draw, *, wrong: int = 0) -> str:
    """A number of one of three networks."""
    prefix, length = draw.choice((([4], 16), ([5, 3], 16), ([3, 7], 15)))
    body = [*prefix, *digits(draw, length - 1 - len(prefix))]
    number = "".join(map(str, [*body, (luhn(body) + wrong) % 10]))
    return draw.choice((number, spaced(number, 4), spaced(number, 4, "-")))


def iban(draw: Draw, *, wrong: int = 0) -> str:
    """An account of one of four countries."""
    country, length, bank = draw.choice((("DE", 18, ""), ("NL", 10, "INGB"), ("ES", 20, ""), ("GB", 14, "WEST")))
    body = bank + "".join(map(str, digits(draw, length)))
    value = int("".join(str(int(c, 36)) for c in f"{body}{country}00"))
    number = f"{country}{(98 - value % 97 - wrong) % 97 + 97 * (98 - value % 97 == 97 and not wrong):02d}{body}"
    return draw.choice((number, spaced(number, 4)))


def identity(draw: Draw) -> str:
    """A number of one of eight registers."""

    def weighed(body: list[int], weights: tuple[int, ...]) -> int:
        return sum(d * w for d, w in zip(body, weights, strict=True))

    while True:
        kind, nine = draw.randrange(8), digits(draw, 9)
        if kind == 0:  # NHS
            check = -weighed(nine, (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11
            if check < 10:
                number = "".join(map(str, [*nine, check]))
                return f"{number[:3]} {number[3:6]} {number[6:]}"
        if kind == 1:  # NIF
            number = "".join(map(str, nine[:8]))
            return number + "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]
        if kind == 2:  # NIE
            first = draw.randrange(3)
            number = "".join(map(str, nine[:7]))
            return "XYZ"[first] + number + "TRWAGMYFPDXBNJZSQVHLCKE"[int(f"{first}{number}") % 23]
        day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(30, 99)
        if kind == 3:  # PESEL
            body = [int(c) for c in f"{year:02d}{month:02d}{day:02d}"] + digits(draw, 4)
            return "".join(map(str, [*body, -weighed(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10]))
        if kind == 4:  # HETU
            born, serial = f"{day:02d}{month:02d}{year:02d}", f"{draw.randint(2, 899):03d}"
            return f"{born}-{serial}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(born + serial) % 31]}"
        if kind == 5:  # personnummer
            body = [int(c) for c in f"{year:02d}{month:02d}{day:02d}"] + digits(draw, 3)
            number = "".join(map(str, [*body, luhn(body)]))
            return f"{number[:6]}-{number[6:]}"
        if kind == 6:  # SSN
            area = draw.choice([n for n in range(1, 900) if n not in (666, 123, 987)])
            return f"{area:03d}-{draw.randint(1, 99):02d}-{draw.randint(1, 9999):04d}"
        if kind == 7:  # T.C. kimlik
            body = nine
            tenth = (7 * sum(body[::2]) - sum(body[1::2])) % 10
            return "".join(map(str, [*body, tenth, (sum(body) + tenth) % 10]))


def machine(draw: Draw) -> str:
    """An address of version 4 or 6, or of a network card."""
    kind = draw.randrange(3)
    if kind == 0:
        return ".".join(str(draw.randint(1, 254)) for _ in range(4))
    if kind == 1:
        return ":".join(f"{draw.randrange(1, 1 << 16):x}" for _ in range(8))
    return draw.choice((":", "-")).join(f"{draw.randrange(256):02X}" for _ in range(6))


def name(draw: Draw) -> str:
    """One of the list."""
    return f"{draw.choice(FIRST)} {draw.choice(LAST)}"


def decoy(draw: Draw) -> str:
    """What looks alike and is none."""
    made: tuple[Callable[[], str], ...] = (
        lambda: f"{draw.randint(1990, 2030)}-{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}",
        lambda: f"{draw.randint(0, 23):02d}:{draw.randint(0, 59):02d}:{draw.randint(0, 59):02d}",
        lambda: f"${draw.randint(1, 99)},{draw.randint(100, 999)}.{draw.randint(10, 99)}",
        lambda: f"order {''.join(map(str, digits(draw, 10)))}",
        lambda: f"ISBN 978{''.join(map(str, digits(draw, 10)))}",
        lambda: f"version {draw.randint(0, 9)}.{draw.randint(0, 20)}.{draw.randint(0, 20)}",
        lambda: f"{draw.randint(100, 999)}x{draw.randint(100, 999)} px",
        lambda: card(draw, wrong=draw.randint(1, 9)),
        lambda: iban(draw, wrong=draw.randint(1, 9)),
        lambda: f"room {draw.randint(1, 40)}-{draw.randint(100, 999)}, @{draw.choice(LAST).lower()}",
    )
    return draw.choice(made)()


def measure() -> dict[str, Any]:
    """Shares by kind, false alarms, and times."""
    draw = Draw(0)
    texts = [record.text.replace("\n", " ") for record in load_records("chitchat", columns={})]
    texts = [text for text in texts if 6 <= len(text.split()) <= 60 and not any(c.isdigit() or c == "@" for c in text)]
    draw.shuffle(texts)
    secret = [text for text in texts[:2000] if len(text.split()) >= 12]
    carriers = texts[2000 : 2000 + 2 * PROMPTS]

    def run_of_row(draw: Draw) -> str:
        words = draw.choice(secret).split()
        first = draw.randint(0, len(words) - 10)
        return " ".join(words[first : first + 10]).strip(punctuation)

    makers = {"mail": mail, "phone": phone, "card": card, "iban": iban, "id": identity, "machine": machine}
    makers |= {"name": name, "row": run_of_row}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "names.txt")
        file.write_text("\n".join(f"{one} {other}" for one in FIRST for other in LAST), encoding="utf-8")
        start = time.perf_counter()
        patterns = patterns_of(tuple(KINDS), where="kinds")
        loading = time.perf_counter() - start
        finders = [patterns, names_in(file, where="names"), private_runs(secret, 8, where="private_words")]
    masked: dict[str, dict[str, int]] = {kind: dict.fromkeys(("planted", "whole", "named"), 0) for kind in makers}
    content, seconds = ContentFilter(finders), list[float]()
    content([carriers[0]])
    for number, text in enumerate(carriers[:PROMPTS]):
        kind = list(makers)[number % len(makers)]
        planted, words = makers[kind](draw), text.split()
        at = draw.randint(1, len(words) - 1)
        before, after = " ".join(words[:at]), " ".join(words[at:])
        prompt = f"{before} {planted} {after}"
        begin, end = len(before) + 1, len(before) + 1 + len(planted)
        start = time.perf_counter()
        content([prompt])
        seconds.append(time.perf_counter() - start)
        found = [one for one in content.found(prompt) if one.start <= begin and one.end >= end - (kind == "row")]
        masked[kind]["planted"] += 1
        masked[kind]["whole"] += bool(found)
        masked[kind]["named"] += any(one.kind == kind for one in found)
    clean, alike = ContentFilter(finders), ContentFilter(finders)
    clean(carriers[PROMPTS:])
    alike([f"{text} {decoy(draw)}" for text in carriers[PROMPTS:]])
    seconds.sort()
    return {
        "date": date.today().isoformat(),
        "kinds": masked,
        "clean": {"prompts": PROMPTS, "found": dict(clean.counts)},
        "alike": {"prompts": PROMPTS, "found": dict(alike.counts)},
        "milliseconds": {"median": 1000 * seconds[len(seconds) // 2], "p99": 1000 * seconds[int(0.99 * len(seconds))]},
        "loading": loading,
    }


def table(result: dict[str, Any]) -> str:
    """Found and called right by kind, false alarms, times."""
    lines = ["| kind | planted | masked whole | by its own kind |", "|---|---:|---:|---:|"]
    for kind, found in result["kinds"].items():
        whole, named = (100 * found[key] / found["planted"] for key in ("whole", "named"))
        lines.append(f"| {kind} | {found['planted']} | {whole:.1f} % | {named:.1f} % |")
    lines += ["", "| prompts | false alarms | of which |", "|---|---:|---|"]
    for title, key in (("nothing in them", "clean"), ("numbers that look alike", "alike")):
        found = result[key]["found"]
        each = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "-"
        lines.append(f"| {result[key]['prompts']:,} with {title} | {sum(found.values())} | {each} |")
    times = result["milliseconds"]
    lines += ["", "| | |", "|---|---:|", f"| milliseconds a prompt, median | {times['median']:.1f} |"]
    lines.append(f"| 99 of 100 within | {times['p99']:.1f} |")
    lines.append(f"| seconds until the patterns are loaded | {result['loading']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was kept."""
    reads = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reads.add_argument("--run", action="store_true", help="measure")
    if reads.parse_args().run:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
