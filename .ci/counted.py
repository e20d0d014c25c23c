"""Assert that a JUnit report holds enough tests that ran, and none skipped for a reason that CI
does not accept.
"""

import os
import sys
from xml.etree import ElementTree

# Why a test may be skipped here, as its message says it: no GPU, a processor without the
# instructions whose faults the test is about, and the image tests, which run by themselves.
ACCEPTED = ("CUDA", "GPU", "AVX512-BF16", "FINREPRO_IMAGE")


def main(report: str, minimum: int) -> int:
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = {
        f"{case.get('classname')}.{case.get('name')}": case.find("skipped") for case in cases
    }
    reasons = {name: mark.get("message", "") for name, mark in skipped.items() if mark is not None}
    accepted = ACCEPTED if "FINREPRO_DATA_DIR" in os.environ else (*ACCEPTED, "FINREPRO_DATA_DIR")
    wrong = [
        f"{name}: {why}"
        for name, why in reasons.items()
        if not any(word in why for word in accepted)
    ]
    ran = len(cases) - len(reasons)
    print(f"counted: {ran} tests ran, {len(reasons)} were skipped (at least {minimum} have to run)")
    for line in wrong:
        print(f"counted: skipped, and CI does not accept why: {line}")
    return 1 if wrong or ran < minimum else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
