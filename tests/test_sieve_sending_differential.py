"""Mail that Sieve scripts send, as Pigeonhole has it: each case is delivered to both, and must come to the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from sieve_cases_sending import CASES as ALL_CASES
from sieve_cases_sending import COPIES
from sieve_peers import Peers, both_sides, outcome_of, shown

CASES = {case.name: case for case in ALL_CASES}

# Where the two differ on purpose: why ours is right.
DIFFERENCES = {
    "redirect-copy-of-the-same": "RFC 3894, 3: a redirect without :copy cancels the implicit keep",
    "redirect-before-copy-the-same": "RFC 3894, 3: a redirect without :copy cancels the implicit keep",
    "redirect-to-the-user": "RFC 5228, 10: what is sent to oneself would come back: it is kept",
    "redirect-to-the-user-in-capitals": "RFC 5228, 10: what is sent to oneself would come back: it is kept",
    "redirect-copy-to-the-user": "RFC 5228, 10: what is sent to oneself would come back: it is kept",
    "redirect-to-the-user-and-another": "RFC 5228, 10: what is sent to oneself would come back: it is kept",
    "redirect-with-a-comment": "RFC 5228, 2.4.2.3: an address has no comment",
    "redirect-again": "the same header again is another try of the client's: what it wanted has been done",
    "redirect-too-many-received": "RFC 5321, 6.3: more than 100 fields Received are a loop",
    "redirect-refused-and-fileinto": "the message is stored; a second copy is of no use",
    "redirect-one-refused-for-now": "the client tries again, and what has been sent is not sent again",
    "vacation-mime-own-field": "RFC 5230, 4.5: the fields of an entity are those of MIME",
    "vacation-their-subject-empty": "an empty subject is none",
    "vacation-their-in-reply-to": "RFC 5322, 3.6.4: In-Reply-To stands for missing References",
    "vacation-from-somebody-else": "RFC 5230, 4.3: :from is one of the user's own addresses",
    "vacation-addresses-in-capitals": "the address is as the script has it",
    "vacation-detail-to-the-user": "RFC 5230, 4.5: the address without the detail is the user's, too",
    "vacation-sender-request-in-capitals": "RFC 5230, 4.6: in any case",
    "vacation-field-list-unsubscribe-post": "RFC 5230, 4.6: any field that begins with List-",
    "vacation-field-list-unknown": "RFC 5230, 4.6: any field that begins with List-",
    "vacation-field-precedence-folded": "RFC 5322, 2.2.3: a folded value is the same value",
    "vacation-field-auto-submitted-no-with-a-comment": "RFC 3834, 5: the keyword is no",
    "vacation-field-auto-submitted-no-with-a-parameter": "RFC 3834, 5: the keyword is no",
    "vacation-field-suppress-autoreply": "the word AutoReply is about such answers",
    "vacation-again-variables": "RFC 5230, 4.2: another subject is another answer",
    "reject-null-sender-utf8": "RFC 5429, 2.2.1: no report to <>; the client is told in English",
    "reject-auto-submitted": "RFC 3834, 2: no report to a program; the client is told",
    "reject-answered-before": "RFC 5429, 2.4: what is answered cannot be rejected, also by another script",
    "notify-plain": "RFC 5436, 2.7: the subject is that of the message",
    "notify-message-empty": "an empty :message is none",
    "notify-from-somebody-else": "RFC 5435, 3.3: :from is one of the user's own addresses",
    "notify-subject-encoded": "RFC 6068, 5: percent encoding of UTF-8",
    "notify-comma": "RFC 6068, 2: a comma divides addresses",
    "notify-to-nobody": "a notification to nobody is a mistake",
    "notify-valid-to-nobody": "a notification to nobody is a mistake",
    "notify-unsafe-fields": "RFC 5436, 2.7: these fields are ignored",
    "notify-wrong-field-line-end": "a line end in a value becomes a space",
    "notify-null-sender": "RFC 5435, 3.3: the notification is from the user",
    "notify-again": "RFC 5436, 2.7: it has been handed over already",
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


@pytest.mark.parametrize("number", range(len(COPIES)), ids=[case.name for case, _ in COPIES])
def test_a_copy_is_what_was_sent(peers: Peers, number: int) -> None:
    """Pigeonhole files no copies: but for ours, the same comes of it."""
    case, expected = COPIES[number]
    ours, theirs, said = peers.results(case)
    sent = {mail.octets.replace(b"\r\n", b"\n") for mail in ours.mails}
    copies = [message for message in ours.stored if message.octets in sent]
    assert {message.folder: message.flags for message in copies} == expected, said
    assert len(copies) == len(expected)
    rest = dataclasses.replace(ours, stored=tuple(message for message in ours.stored if message not in copies))
    assert outcome_of(rest, case) == outcome_of(theirs, case), said


def test_cases_have_names_of_their_own() -> None:
    assert len(ALL_CASES) == len(CASES)
    assert not DIFFERENCES.keys() - CASES.keys()
