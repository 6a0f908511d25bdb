"""Sieve as Pigeonhole has it: each case is delivered to both, and must come to the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sieve_cases_errors
import sieve_cases_headers
import sieve_cases_language
import sieve_cases_mime
import sieve_cases_state
from sieve_cases import Case
from sieve_peers import Peers, both_sides, shown

CASES = {
    f"{group}-{case}": case
    for group, cases in {
        "language": sieve_cases_language.CASES,
        "headers": sieve_cases_headers.CASES,
        "state": sieve_cases_state.CASES,
        "mime": sieve_cases_mime.CASES,
        "errors": sieve_cases_errors.CASES,
    }.items()
    for case in cases
}

# Where the two differ on purpose: why ours is right.
DIFFERENCES = {
    "language-matches-star-three-marks": "RFC 5228, 2.7.1: each ? is a character; two characters are not three",
    "language-copy-of-the-same": "RFC 3894, 3: a fileinto without :copy cancels the implicit keep",
    "language-sequence-same-folder-twice": "RFC 5228, 2.10.2: fileinto cancels the implicit keep",
    "language-regex-variable-quoted": "draft-ietf-sieve-regex: :quoteregex",
    "headers-folded-at-once": "RFC 5228, 2.4.2.2: white space at both ends of a value does not count",
    "headers-add-blanks-around": "RFC 5228, 2.4.2.2: white space at both ends of a value does not count",
    "headers-index-count": "RFC 5260, 6: the test is done on the field of that index alone",
    "state-string-default-comparator": "RFC 5228, 2.7.3: i;ascii-casemap is the default",
    "state-string-numeric-nothing": "RFC 4790, 9.1.1: every string without a digit first is the same infinity",
    "state-set-to-itself": "RFC 5229, 4: the value is what the string comes to",
    "state-flags-repeated": "RFC 5232, 2: a flag that is named twice is no reason to forget the others",
    "mime-type-broken": "RFC 2045, 5.2: what has no valid type is text/plain",
    "mime-loop-anychild": "RFC 5703, 4.1: the children of the part, not what comes behind it",
    "errors-deleteheader-last-alone": "RFC 5293, 5: :last is there only with :index",
    "errors-wrong-utf8-in-a-comment": "RFC 5228, 2.1: scripts are UTF-8",
    "errors-relational-capitals": "RFC 5231, 8: the relation is not sensitive to case, as all strings of ABNF",
    "language-bare-cr": "RFC 5228, 8.1: a CR alone is no white space",
    "headers-word-unknown-charset": "RFC 2047, 6.2: a word in an unknown charset is shown as it is",
    "headers-word-not-utf8": "RFC 2047, 6.3: a word that is wrong in its charset is shown as it is",
    "headers-address-no-angle-end": "RFC 5228, 5.1: the address is plain, though > is missing",
    "headers-address-no-domain": "RFC 5228, 5.1: local mail has addresses without a domain",
    "headers-envelope-null-count": "RFC 5231, 4.2: the count of the null reverse-path is 0",
    "headers-spamtestplus-none": "RFC 5235, 2.2: without a check the count is 0",
    "state-flags-of-inbox-and-keep": "RFC 5232, 5: the flags of the last action that files it",
    "state-include-missing-in-a-branch": "RFC 6609, 3.2: what is not run need not be there",
}


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with both_sides() as peers:
        yield peers


@pytest.mark.parametrize("name", CASES)
def test_the_same_comes_of_it(peers: Peers, name: str) -> None:
    case = CASES[name]
    ours, theirs, said = peers.outcomes(case)
    if name in DIFFERENCES:
        assert ours != theirs, f"{DIFFERENCES[name]}: this is no difference any more"
    else:
        assert ours == theirs, shown(case, ours, theirs, said)


def test_cases_have_names_of_their_own() -> None:
    groups = (sieve_cases_language, sieve_cases_headers, sieve_cases_state, sieve_cases_mime, sieve_cases_errors)
    cases: list[Case] = [case for group in groups for case in group.CASES]
    assert len(cases) == len(CASES)
    assert not DIFFERENCES.keys() - CASES.keys()
