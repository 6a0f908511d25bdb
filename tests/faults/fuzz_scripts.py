"""Sieve: a script and a message, through the filters, delivery and submission, to a Maildir and an SMTP server.

An input has a line of options, the script, the message, and a script that the first may include, with lines "%%"
between them.
"""

from __future__ import annotations

import os
import re
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

from fuzz_target import Target, forget_records
from harness import Site
from sieve import Outcome, Sieve, octets_of, script_text
from sink import Mail, Sink
from test_sieve_fuzz import MESSAGES, REQUIRE, REQUIRE_ALL, SCRIPTS, TOKEN, TOKENS, WRONG_SCRIPTS

import lmtpd

DIVISION = b"\n%%\n"
SENDERS = ("sender@example.org", "", "owner-list@example.org", "jane@example.com", '"a b"@example.org', "ü@example.org")
TROUBLE = {"internal-error", "traceback", "delivery-failed", "script-failed", "sending-failed", "spooling-failed"}
ENDS = {"discarded", "redirected", "rejected"}  # of a message that no folder has
DEFERRED_BY = {"mail-not-sent", "mailbox-not-accessible"}
SENDING = (
    'vacation "I am away";',
    'vacation :days 1 :subject "Away: ${subject}" :addresses ["j@example.com"] text:\nx\n.\n;',
    'vacation :from "Jane <jane@example.com>" "x";',
    'vacation :mime :handle "h" "Content-Type: text/html\\n\\n<p>away</p>";',
    'vacation :seconds 3 :fcc "Sent" :flags ["\\\\Seen"] :create "away";',
    'redirect "other@example.net";',
    'redirect :copy "other@example.net";',
    'set "x" "other"; redirect "${x}@example.net";',
    'reject "no, thank you";',
    "ereject text:\nno\n..\n.\n;",
    'notify "mailto:other@example.net?subject=new%20mail&body=a%0D%0Ab";',
    'notify :importance "1" :message "${subject}" "mailto:o@example.net?cc=p@example.net&x-a=b";',
    'notify :from "jane@example.com" "mailto:o@example.net";',
    'if header :matches "Subject" "*" { set "subject" "${1}"; } vacation :subject "${subject}" "${subject}";',
    'if valid_notify_method "mailto:a@b" { notify :fcc "Sent" "mailto:a@example.net"; }',
    'addheader "X-A" "${unicode:0a}b"; addheader :last "Subject" "x"; redirect "o@example.net";',
    'deleteheader :index 1 "Received"; redirect "o@example.net"; keep;',
)
REQUIRE_MORE = octets_of(script_text("vacation vacation-seconds fcc reject ereject enotify", ""))
LETTERS = (
    b"From: A <a@example.org>\nTo: jane@example.com\nSubject: hello\nMessage-ID: <1@example.org>\n\nA body.\n",
    b"To: Jane <jane+detail@example.com>\nSubject: =?utf-8?q?a=0D=0AX-A:_b?=\nReferences: <a@b>\n\nA\rbody.\n.\n..\n",
    b"Cc: jane@example.com\nIn-Reply-To: <a@b>\nMessage-ID: <1@example.org>\r\nSubject: a\rb\n\nx",
    b"To: j@example.com, jane@example.com\nSubject: " + b"x" * 400 + b"\n \xe4\n\tx\nFrom: =?utf-8?b?w6Q=?= <a@b>\n\n",
)
FIELD = re.compile(rb"[!-9;-~]+:")
GENERATED = re.compile(
    rb"(from|to|cc|subject|in-reply-to|references|auto-submitted|date|message-id|mime-version|importance|content-[\w-]+)",
    re.IGNORECASE,
)
ONCE = (b"from", b"subject", b"date", b"message-id", b"mime-version", b"auto-submitted")
VERBS = ("EHLO", "MAIL", "RCPT", "DATA", "QUIT", "RSET")


class Scripts(Target):
    """Sieve scripts, with messages on which they run."""

    name = "sieve"
    token = TOKEN
    unit = re.compile(rb"[^\n;{}]*[\n;{}]?")

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._sink = stack.enter_context(Sink())
            clock = types.ModuleType("time")
            clock.__dict__.update({**vars(time), "sleep": lambda _: None})
            stack.enter_context(mock.patch.object(lmtpd, "time", clock))
            self._sites = []
            for options in (
                {"sieve_use_lmtp_reject": "yes"},
                {
                    "sieve_use_lmtp_reject": "no",
                    "lmtp_detail_create": "yes",
                    "before": 'require "variables"; set "v" "a";',
                },
            ):
                fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else ""
                site = Site(fast)
                stack.callback(site.close)
                site.add_user("jane")
                scores = {
                    "sieve_spamtest_status_header": "X-Spam-Score",
                    "sieve_spamtest_max_value": "10",
                    "sieve_virustest_status_header": "X-Virus",
                    "sieve_virustest_max_value": "5",
                    "xlist-junk": "Junk",
                }
                before = options.pop("before", "")
                self._sites.append(Sieve(site, self._sink, before, **scores, **options))
                self._sites[-1].write_global("one", 'require "fileinto"; fileinto "global";')
            self._stack = stack.pop_all()

    def __call__(self, data: bytes) -> None:
        options, _, rest = data.partition(b"\n")
        script, message, included, *_ = [*rest.split(DIVISION), b"", b""]
        number = int.from_bytes(options[:1], "big")
        sieve, sender = self._sites[number & 1], SENDERS[(number >> 1) % len(SENDERS)]
        self._sink.mails.clear()
        self._sink.commands.clear()
        try:
            outcome = sieve.run(script, message, sender, "detail" if options[1:2] == b"+" else "", one=included)
            verify(outcome)
            self._check_commands()
            for mail, event in zip(outcome.sent, outcome.fields("mail-sent")):
                check_mail(mail.mail, event["action"])
            assert not self._sink.faults, self._sink.faults
        finally:
            self._sink.faults.clear()
            self._reset(sieve)

    def _check_commands(self) -> None:
        """Fails if a message has commands of SMTP in it that were taken for such."""
        assert all(command.split(" ")[0] in VERBS for command in self._sink.commands), self._sink.commands

    def _reset(self, sieve: Sieve) -> None:
        sieve.clear()
        forget_records(sieve.site.configdirectory / "deliver.db")
        (sieve.site.configdirectory / "smtp.backoff").unlink(missing_ok=True)
        for path in (sieve.folder / "active.sieve.log", sieve.folder / "one.sieve.log"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._stack.close()

    def seeds(self) -> Iterator[bytes]:
        for number, script in enumerate((*SCRIPTS, *WRONG_SCRIPTS), 1):
            yield self._input(number, script, MESSAGES[number * 7 % len(MESSAGES)])
        for each in SENDING:
            script = REQUIRE_ALL + REQUIRE_MORE + b"\n" + octets_of(each)
            for number, letter in zip((0, 1, 6, 7), LETTERS):
                yield self._input(number, script, letter)

    def _input(self, number: int, script: bytes, message: bytes) -> bytes:
        included = REQUIRE.sub(b"", SCRIPTS[number % len(SCRIPTS)])
        return bytes([ord("0") + number % 10]) + b"\n" + DIVISION.join((script, message, REQUIRE_ALL + included))

    def words(self) -> list[bytes]:
        return [*TOKENS, *(b" %s " % word for word in octets_of(" ".join(SENDING)).split()), DIVISION]


def verify(outcome: Outcome) -> None:
    """Fails if the message is neither stored, sent on, discarded nor refused, or something went wrong in lmtpd."""
    names = {event.name for event in outcome.events}
    assert not names & TROUBLE, outcome.events
    if outcome.reply == "250 2.1.5":
        assert outcome.folders or names & ENDS, outcome.events
    elif outcome.reply.startswith("4"):
        assert names & DEFERRED_BY, outcome
        assert not outcome.folders
    else:
        assert outcome.reply in ("550 5.7.1", "554 5.6.0"), outcome.reply
        assert outcome.reply == "550 5.7.1" or not outcome.folders
    if outcome.errors and outcome.reply == "250 2.1.5":
        assert outcome.folders, outcome


def check_mail(mail: Mail, action: str) -> None:
    """Fails if a mail has bare CR or LF, or fields that only a line break in a value can have made."""
    octets = mail.octets
    assert b"\n" not in octets.replace(b"\r\n", b""), octets
    assert b"\r" not in octets.replace(b"\r\n", b""), octets
    assert b"\0" not in octets, octets
    if action == "redirect":
        return
    header = octets.partition(b"\r\n\r\n")[0]
    lines = re.sub(rb"\r\n[ \t]", b" ", header).split(b"\r\n")
    assert all(FIELD.match(line) for line in lines), header
    names = [line.partition(b":")[0].lower() for line in lines]
    for name in ONCE:
        assert names.count(name) == 1, (name, header)
    if action != "notify":
        assert all(GENERATED.fullmatch(name) for name in names), header
    assert all(len(line) <= 998 for line in header.split(b"\r\n")), header
