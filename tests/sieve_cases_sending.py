"""Scripts that send mail: what goes to whom, and what becomes of the message."""

from __future__ import annotations

from dataclasses import replace

from sieve_cases import Case, letter, require

FROM = "From: Jane Doe <jane@example.org>"
TO = 'To: username@example.com, "Roe, Richard" <richard@example.net>'
SUBJECT = "Subject: A letter"
DATE = "Date: Sat, 24 Feb 2024 23:59:58 +0530"
MESSAGE_ID = "Message-ID: <1@example.org>"
LETTER = letter(FROM, TO, SUBJECT, DATE, MESSAGE_ID)


def with_field(*fields: str | bytes) -> bytes:
    """The letter with more fields at its top."""
    return letter(*fields, FROM, TO, SUBJECT, DATE, MESSAGE_ID)


def with_subject(*fields: str | bytes) -> bytes:
    """The letter with these in place of its subject."""
    return letter(FROM, TO, *fields, DATE, MESSAGE_ID)


def with_message_id(*fields: str) -> bytes:
    """The letter with these in place of its Message-ID."""
    return letter(FROM, TO, SUBJECT, DATE, *fields)


def addressed(*fields: str) -> bytes:
    """The letter with these in place of To."""
    return letter(FROM, *fields, SUBJECT, DATE, MESSAGE_ID)


def sends(
    name: str,
    commands: str,
    *capabilities: str,
    message: bytes = LETTER,
    sender: str = "sender@example.org",
    detail: str = "",
    times: int = 1,
    refuse: dict[str, str] | None = None,
) -> Case:
    """A script of these commands, for a letter to the user himself."""
    script = require(*capabilities) + commands + "\n"
    return Case(name, script, message, sender, detail, times=times, refuse=refuse or {})


def followed(case: Case, *others: Case) -> Case:
    """The case, and others for the same user after it."""
    return replace(case, then=others)


def beside(case: Case, before: str = "", after: str = "") -> Case:
    """The case with scripts of the site."""
    return replace(case, before=before, after=after)


REDIRECTS = [
    sends("redirect", 'redirect "a@example.net";'),
    sends("redirect-copy", 'redirect :copy "a@example.net";', "copy"),
    sends("redirect-and-keep", 'redirect "a@example.net"; keep;'),
    sends("redirect-and-fileinto", 'redirect "a@example.net"; fileinto "f";', "fileinto"),
    sends("redirect-and-discard", 'redirect "a@example.net"; discard;'),
    sends("redirect-copy-and-discard", 'redirect :copy "a@example.net"; discard;', "copy"),
    sends("redirect-and-stop", 'redirect "a@example.net"; stop; keep;'),
    sends("redirect-in-a-branch", 'if header "subject" "A letter" { redirect "a@example.net"; }'),
    sends("redirect-two", 'redirect "a@example.net"; redirect "b@example.net";'),
    sends("redirect-two-the-same", 'redirect "a@example.net"; redirect "a@example.net";'),
    sends("redirect-domain-in-capitals", 'redirect "a@example.net"; redirect "a@EXAMPLE.net";'),
    sends("redirect-copy-of-the-same", 'redirect :copy "a@example.net"; redirect "a@example.net";', "copy"),
    sends("redirect-same-as-copy", 'redirect "a@example.net"; redirect :copy "a@example.net";', "copy"),
    sends("redirect-four", "".join(f'redirect "a{number}@example.net";' for number in range(4))),
    sends("redirect-five", "".join(f'redirect "a{number}@example.net";' for number in range(5))),
    sends("redirect-five-the-same", 5 * 'redirect "a@example.net";'),
    sends(
        "redirect-five-and-others",
        'fileinto "x"; keep;' + "".join(f'redirect "a{number}@example.net";' for number in range(5)),
        "fileinto",
    ),
    sends("redirect-to-the-user", 'redirect "username@example.com";'),
    sends("redirect-to-the-user-in-capitals", 'redirect "USERNAME@EXAMPLE.COM";'),
    sends("redirect-copy-to-the-user", 'redirect :copy "username@example.com";', "copy"),
    sends("redirect-to-the-user-and-another", 'redirect "username@example.com"; redirect "a@example.net";'),
    sends("redirect-to-the-sender", 'redirect "sender@example.org";'),
    sends("redirect-null-sender", 'redirect "a@example.net";', sender=""),
    sends("redirect-sender-with-detail", 'redirect "a@example.net";', sender="sender+x@example.org"),
    sends("redirect-for-a-detail", 'redirect "a@example.net";', detail="d"),
    sends("redirect-null-copy-for-a-detail", 'redirect :copy "a@example.net";', "copy", sender="", detail="d"),
    sends("redirect-received", 'redirect "a@example.net";', message=with_field("Received: from x by y; now")),
    sends("redirect-delivered-to", 'redirect "a@example.net";', message=with_field("X-Delivered: q@example.com")),
    sends("redirect-return-path", 'redirect "a@example.net";', message=with_field("Return-Path: <old@example.org>")),
    sends(
        "redirect-eight-bits", 'redirect "a@example.net";', message=letter(FROM, TO, MESSAGE_ID, body=b"\xc3\xa4\xff\n")
    ),
    sends("redirect-utf8-header", 'redirect "a@example.net";', message=with_field("X-Word: größe")),
    sends("redirect-dots", 'redirect "a@example.net";', message=letter(FROM, MESSAGE_ID, body=".\n..\n.dot\n...\n")),
    sends("redirect-long-line", 'redirect "a@example.net";', message=letter(FROM, MESSAGE_ID, body=900 * "x" + "\n")),
    sends("redirect-no-last-line-end", 'redirect "a@example.net";', message=letter(FROM, MESSAGE_ID, body="no end")),
    sends("redirect-empty-body", 'redirect "a@example.net";', message=letter(FROM, MESSAGE_ID, body="")),
    sends(
        "redirect-edited",
        'addheader "X-New" "v"; redirect "a@example.net"; addheader "X-Newer" "w"; redirect "b@example.net"; '
        'deleteheader "Subject"; keep;',
        *("editheader",),
    ),
    sends("redirect-deleted", 'deleteheader "Subject"; redirect "a@example.net";', "editheader"),
    sends("redirect-added-utf8", 'addheader "X-New" "größe"; redirect "a@example.net";', "editheader"),
    sends("redirect-to-a-variable", 'set "a" "b"; redirect "${a}@example.net";', "variables"),
    sends(
        "redirect-to-what-matched",
        'if header :matches "to" "*@*" { redirect "${1}@example.net"; }',
        "variables",
        message=addressed("To: ann@example.com"),
    ),
    sends("redirect-with-a-name", 'redirect "Ann <a@example.net>";'),
    sends("redirect-with-a-quoted-name", 'redirect "\\"Doe, Ann\\" <a@example.net>";'),
    sends("redirect-in-angles", 'redirect "<a@example.net>";'),
    sends("redirect-to-a-literal", 'redirect "a@[127.0.0.1]";'),
    sends("redirect-with-a-comment", 'redirect "a@example.net (Ann)";'),
    sends("redirect-percent", 'redirect "a%b@example.net";'),
    sends("redirect-slash", 'redirect "a/b@example.net";'),
    sends("redirect-dash-first", 'redirect "-a@example.net";'),
    sends("redirect-plus", 'redirect "a+b@example.net";'),
    sends("redirect-quoted", 'redirect "\\"a b\\"@example.net";'),
    *(
        sends(f"redirect-wrong-{name}", f'fileinto "x"; redirect "{address}";', "fileinto")
        for name, address in {
            "no-domain": "a",
            "empty-domain": "a@",
            "no-local-part": "@example.net",
            "blank": "a b@example.net",
            "blank-in-the-domain": "a@b example.net",
            "two": "a@example.net, b@example.net",
            "empty": "",
            "angles-alone": "<>",
            "semicolon": "a@example.net;",
            "two-at": "a@b@example.net",
            "two-at-together": "a@@example.net",
            "two-dots": "a@b..example.net",
            "dot-at-the-end": "a@example.net.",
            "group": "friends:a@example.net;",
            "postmaster": "postmaster",
        }.items()
    ),
    *(
        sends(
            f"redirect-variable-{name}",
            f'set "a" "{address}"; fileinto "x"; redirect "${{a}}";',
            *("variables", "fileinto"),
        )
        for name, address in {
            "no-domain": "a",
            "two": "a@example.net, b@example.net",
            "empty": "",
            "blank": "a b@example.net",
            "line-end": "a\r\nb@example.net",
            "with-a-name": "Ann <a@example.net>",
        }.items()
    ),
    sends("redirect-no-address", "redirect;"),
    sends("redirect-list", 'redirect ["a@example.net"];'),
    sends("redirect-two-addresses", 'redirect "a@example.net" "b@example.net";'),
    sends("redirect-copy-not-required", 'redirect :copy "a@example.net";'),
    sends("redirect-unknown-tag", 'redirect :fcc "a" "a@example.net";'),
    sends("redirect-then-an-error", 'redirect "a@example.net"; fileinto "a//b";', "fileinto"),
    sends("redirect-then-error", 'redirect "a@example.net"; error "It is so.";', "ihave"),
    sends("redirect-again", 'redirect "a@example.net";', times=2),
    sends("redirect-again-no-message-id", 'redirect "a@example.net";', message=with_message_id(), times=2),
    sends("redirect-copy-again", 'redirect :copy "a@example.net";', "copy", times=2),
    followed(
        sends("redirect-loop", 'redirect "a@example.net";'),
        sends("", 'redirect "a@example.net";', message=with_field("X-Loop: yes")),
    ),
    followed(
        sends("redirect-loop-to-another", 'redirect "a@example.net";'),
        sends("", 'redirect "b@example.net";', message=with_field("X-Loop: yes")),
    ),
    followed(
        sends("redirect-another-message", 'redirect "a@example.net";'),
        sends("", 'redirect "a@example.net";', message=with_message_id("Message-ID: <2@example.org>")),
    ),
    sends(
        "redirect-hundred-received",
        'redirect "a@example.net";',
        message=with_field(*(100 * ["Received: from x by y; now"])),
    ),
    sends(
        "redirect-too-many-received",
        'redirect "a@example.net";',
        message=with_field(*(101 * ["Received: from x by y; now"])),
    ),
    beside(sends("redirect-before", ""), 'redirect "a@example.net";'),
    beside(sends("redirect-after", ""), after='redirect "a@example.net";'),
    beside(sends("redirect-before-and-own-keep", "keep;"), 'redirect "a@example.net";'),
    beside(
        sends("redirect-before-copy-and-own", 'redirect "b@example.net";'),
        'require "copy"; redirect :copy "a@example.net";',
    ),
    beside(sends("redirect-before-copy-and-discard", "discard;"), 'require "copy"; redirect :copy "a@example.net";'),
    beside(
        sends("redirect-before-copy-and-an-error", 'fileinto "a//b";', "fileinto"),
        'require "copy"; redirect :copy "a@example.net";',
    ),
    beside(
        sends("redirect-before-copy-the-same", 'redirect "a@example.net";'),
        'require "copy"; redirect :copy "a@example.net";',
    ),
    sends("redirect-refused-for-now", 'redirect "a@example.net";', refuse={"a@example.net": "451 4.3.0 Later"}),
    sends("redirect-refused", 'redirect "a@example.net";', refuse={"a@example.net": "550 5.1.1 Unknown"}),
    sends("redirect-refused-hangs-up", 'redirect "a@example.net";', refuse={"a@example.net": "421 4.3.2 Gone"}),
    sends("redirect-refused-no-fields", 'redirect "a@example.net";', refuse={"a@example.net": "550 no"}, sender=""),
    sends(
        "redirect-refused-in-the-folder-of-the-detail",
        'redirect "a@example.net";',
        refuse={"a@example.net": "550 5.1.1 Unknown"},
        detail="d",
    ),
    sends(
        "redirect-refused-and-keep", 'redirect "a@example.net"; keep;', refuse={"a@example.net": "550 5.1.1 Unknown"}
    ),
    sends(
        "redirect-refused-and-fileinto",
        'redirect "a@example.net"; fileinto "f";',
        "fileinto",
        refuse={"a@example.net": "550 5.1.1 Unknown"},
    ),
    sends(
        "redirect-one-refused",
        'redirect "a@example.net"; redirect "b@example.net";',
        refuse={"b@example.net": "550 5.1.1 Unknown"},
    ),
    sends(
        "redirect-one-refused-for-now",
        'redirect "a@example.net"; redirect "b@example.net";',
        refuse={"b@example.net": "451 4.3.0 Later"},
        times=2,
    ),
]


def away(name: str, arguments: str = '"I am away."', message: bytes = LETTER, **others: str) -> Case:
    """Somebody who is on vacation. others: sender, detail."""
    return sends(
        f"vacation-{name}",
        f"vacation {arguments};",
        *("vacation", "vacation-seconds"),
        message=message,
        sender=others.get("sender", "sender@example.org"),
        detail=others.get("detail", ""),
    )


def mime(name: str, entity: str) -> Case:
    return away(name, f":mime text:\n{entity}\n.\n")


VACATION_TEXTS = [
    away("plain"),
    away("utf8", '"Ich bin verreist … für immer."'),
    away("two-lines", '"One.\r\nTwo."'),
    away("dots", "text:\n..\n...a\nb\n.\n"),
    away("empty", '""'),
    away("blanks-at-line-ends", '"One. \r\n\tTwo.  \r\n"'),
    away("equals-signs", '"a=b =3D ="'),
    away("long-text", f'"{300 * "word "}"'),
    away("long-word", f'"{900 * "w"}"'),
    away("long-utf8", f'"{300 * "wörter "}"'),
    away("from-line", '"From here on.\r\nFrom there."'),
    away("controls", '"a\tb\x0bc"'),
    mime("mime", "Content-Type: text/html; charset=utf-8\n\n<b>hello</b>"),
    mime("mime-utf8", "Content-Type: text/html; charset=utf-8\n\n<b>größe</b>"),
    mime("mime-own-field", "Content-Type: text/plain; charset=utf-8\nX-Own: yes\n\nhello"),
    mime("mime-encoded", "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\naGVsbG8="),
    mime(
        "mime-quoted-printable",
        "Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\ngr=F6=DFe",
    ),
    mime(
        "mime-alternative",
        "Content-Type: multipart/alternative; boundary=limit\n\n--limit\n\nhello\n--limit\n"
        "Content-Type: text/html\n\n<b>hello</b>\n--limit--",
    ),
    mime("mime-folded", "Content-Type: text/html;\n charset=utf-8\n\n<b>hello</b>"),
    mime("mime-language", "Content-Type: text/plain\nContent-Language: de\n\nHallo"),
    away("subject", ':subject "Gone" "Away."'),
    away("subject-utf8", ':subject "Weg für immer" "Away."'),
    away("subject-utf8-alone", ':subject "größe" "Away."'),
    away("subject-like-encoded", ':subject "=?utf-8?q?x?=" "Away."'),
    away("subject-long", f':subject "{40 * "word "}end" "Away."'),
    away("subject-long-utf8", f':subject "{25 * "wörter "}ende" "Away."'),
    away("subject-empty", ':subject "" "Away."'),
    away("subject-blanks", ':subject "  a  b " "Away."'),
    away("their-subject-none", message=with_subject()),
    away("their-subject-empty", message=with_subject("Subject:")),
    away("their-subject-encoded", message=with_subject("Subject: =?utf-8?q?gr=C3=B6=C3=9Fe?= etc.")),
    away("their-subject-latin1", message=with_subject("Subject: =?iso-8859-1?q?gr=F6=DFe?=")),
    away("their-subject-utf8", message=with_subject("Subject: größe")),
    away("their-subject-folded", message=with_subject("Subject: one\n two")),
    away("their-subject-two", message=with_subject("Subject: one", "Subject: two")),
    away("their-subject-is-auto", message=with_subject("Subject: Auto: one")),
    away("their-subject-long", message=with_subject(f"Subject: {40 * 'word '}end")),
    away("their-message-id-none", message=with_message_id()),
    away("their-message-id-with-a-comment", message=with_message_id("Message-ID: <1@example.org> (one)")),
    away("their-message-id-folded", message=with_message_id("Message-ID:\n <1@example.org>")),
    away("their-references", message=with_field("References: <a@b> <c@d>")),
    away("their-references-folded", message=with_field("References: <a@b>\n <c@d>", "In-Reply-To: <c@d>")),
    away("their-in-reply-to", message=with_field("In-Reply-To: <c@d>")),
    away("their-in-reply-to-two", message=with_field("In-Reply-To: <c@d> <e@f>")),
    away("their-reply-to", message=with_field("Reply-To: other@example.org")),
    away("their-date-none", message=letter(FROM, TO, SUBJECT, MESSAGE_ID)),
    away("from-the-user", ':from "username@example.com" "Away."'),
    away("from-the-user-with-a-name", ':from "Jane Doe <username@example.com>" "Away."'),
    away("from-the-user-with-a-name-in-utf8", ':from "Jörg <username@example.com>" "Away."'),
    away("from-the-user-with-a-quoted-name", ':from "\\"Doe, Jane\\" <username@example.com>" "Away."'),
    away("from-the-user-in-capitals", ':from "USERNAME@EXAMPLE.com" "Away."'),
    away("from-one-of-the-addresses", ':from "richard@example.net" :addresses "richard@example.net" "Away."'),
    away("from-somebody-else", ':from "boss@example.org" "Away."'),
    sends(
        "vacation-variables",
        'if header :matches "subject" "*" { vacation :subject "Re: ${1}" "About ${1}."; }',
        *("vacation", "variables"),
    ),
    sends(
        "vacation-edited",
        'deleteheader "Subject"; addheader "Subject" "New"; vacation "Away.";',
        *("vacation", "editheader"),
    ),
]

VACATION_CONDITIONS = [
    away("to-nobody", message=addressed("To: richard@example.net")),
    away("to-somebody-alike", message=addressed("To: xusername@example.com, username@example.org")),
    away("to-capitals", message=addressed("To: USERNAME@EXAMPLE.COM")),
    away("to-a-name-that-is-the-address", message=addressed('To: "username@example.com" <x@example.net>')),
    away("to-a-group", message=addressed("To: friends: x@example.net, username@example.com;")),
    away("to-folded", message=addressed("To: x@example.net,\n username@example.com")),
    away("to-in-the-second-field", message=addressed("To: x@example.net", "To: username@example.com")),
    away("to-with-a-comment", message=addressed("To: username@example.com (me)")),
    away("to-encoded-word", message=addressed("To: =?utf-8?q?J=C3=B6rg?= <username@example.com>")),
    *(
        away(f"named-in-{name.lower()}", message=addressed("To: x@example.net", f"{name}: username@example.com"))
        for name in ("Cc", "Bcc", "Resent-To", "Resent-Cc", "Resent-Bcc", "Apparently-To", "Delivered-To", "X-To")
    ),
    away("addresses", ':addresses "richard@example.net" "Away."', addressed("To: richard@example.net")),
    away(
        "addresses-two",
        ':addresses ["a@b.example", "richard@example.net"] "Away."',
        addressed("Cc: richard@example.net"),
    ),
    away("addresses-in-capitals", ':addresses "Richard@EXAMPLE.net" "Away."', addressed("To: richard@example.net")),
    away(
        "addresses-with-a-name", ':addresses "Rich <richard@example.net>" "Away."', addressed("To: richard@example.net")
    ),
    away("addresses-not-there", ':addresses "a@b.example" "Away."', addressed("To: richard@example.net")),
    away("addresses-and-own", ':addresses "richard@example.net" "Away."'),
    away("detail-as-delivered", message=addressed("To: username+d@example.com"), detail="d"),
    away("detail-to-the-user", detail="d"),
    away("detail-of-another", message=addressed("To: username+x@example.com"), detail="d"),
    away("detail-only-in-to", message=addressed("To: username+x@example.com")),
    *(
        away(f"sender-{name}", sender=sender)
        for name, sender in {
            "null": "",
            "owner": "owner-list@example.org",
            "request": "list-request@example.org",
            "request-in-capitals": "LIST-REQUEST@example.org",
            "listserv": "listserv@example.org",
            "listserv-in-capitals": "LISTSERV@example.org",
            "majordomo": "majordomo@example.org",
            "mailer-daemon": "MAILER-DAEMON@example.org",
            "like-listserv": "listserver@example.org",
            "like-mailer-daemon": "mailer-daemon-x@example.org",
            "owner-alone": "owner@example.org",
            "request-alone": "request@example.org",
            "postmaster": "postmaster@example.org",
            "noreply": "noreply@example.org",
            "bounces": "list-bounces@example.org",
            "with-detail": "sender+x@example.org",
            "the-user": "username@example.com",
            "the-user-in-capitals": "USERNAME@EXAMPLE.com",
            "the-user-with-detail": "username+x@example.com",
        }.items()
    ),
    away("sender-one-of-the-addresses", ':addresses "r@example.net" "Away."', sender="R@example.net"),
    *(
        away(f"field-{name}", message=with_field(field))
        for name, field in {
            "list-id": "List-Id: <x.example.org>",
            "list-id-empty": "List-Id:",
            "list-id-lower-case": "list-id: <x.example.org>",
            "list-help": "List-Help: <mailto:x@example.org>",
            "list-subscribe": "List-Subscribe: <mailto:x@example.org>",
            "list-unsubscribe": "List-Unsubscribe: <mailto:x@example.org>",
            "list-post": "List-Post: <mailto:x@example.org>",
            "list-owner": "List-Owner: <mailto:x@example.org>",
            "list-archive": "List-Archive: <mailto:x@example.org>",
            "list-unsubscribe-post": "List-Unsubscribe-Post: List-Unsubscribe=One-Click",
            "list-unknown": "List-Unknown: x",
            "mailing-list": "Mailing-List: x",
            "precedence-bulk": "Precedence: bulk",
            "precedence-bulk-in-capitals": "Precedence: BULK",
            "precedence-list": "Precedence: list",
            "precedence-junk": "Precedence: junk",
            "precedence-first-class": "Precedence: first-class",
            "precedence-folded": "Precedence:\n bulk",
            "precedence-like-bulk": "Precedence: bulky",
            "auto-submitted-no": "Auto-Submitted: no",
            "auto-submitted-no-in-capitals": "Auto-Submitted: NO",
            "auto-submitted-no-with-a-comment": "Auto-Submitted: no (by hand)",
            "auto-submitted-no-with-a-parameter": "Auto-Submitted: no; by=hand",
            "auto-submitted-generated": "Auto-Submitted: auto-generated",
            "auto-submitted-replied": "Auto-Submitted: auto-replied (vacation)",
            "auto-submitted-unknown": "Auto-Submitted: whatever",
            "suppress-all": "X-Auto-Response-Suppress: All",
            "suppress-oof": "X-Auto-Response-Suppress: OOF",
            "suppress-oof-in-lower-case": "X-Auto-Response-Suppress: oof",
            "suppress-autoreply": "X-Auto-Response-Suppress: AutoReply",
            "suppress-several": "X-Auto-Response-Suppress: DR, OOF, AutoReply",
            "suppress-dr": "X-Auto-Response-Suppress: DR, RN, NRN",
            "suppress-none": "X-Auto-Response-Suppress: None",
            "spam": "X-Spam-Flag: YES",
            "report": "Content-Type: multipart/report; report-type=delivery-status; boundary=x",
            "return-path": "Return-Path: <>",
            "loop": "X-Loop: yes",
        }.items()
    ),
]


def again(name: str, first: str, second: str, message: bytes = LETTER, **others: str) -> Case:
    """An answer to one message, and what becomes of another one."""
    return followed(away(f"again-{name}", first), away("", second, message, **others))


VACATION_INTERVALS = [
    again("same", '"Away."', '"Away."'),
    again("another-sender", '"Away."', '"Away."', sender="other@example.org"),
    again("sender-in-capitals", '"Away."', '"Away."', sender="Sender@EXAMPLE.org"),
    again("another-text", '"Away."', '"Away again."'),
    again("another-subject", '"Away."', ':subject "s" "Away."'),
    again("another-from", '"Away."', ':from "username@example.com" "Away."'),
    again("as-mime", '"Away."', ':mime "Content-Type: text/plain\r\n\r\nAway."'),
    again("other-addresses", '"Away."', ':addresses "richard@example.net" "Away."'),
    again("other-days", '"Away."', ':days 30 "Away."'),
    again("another-subject-of-theirs", '"Away."', '"Away."', with_subject("Subject: Another")),
    again("another-message", '"Away."', '"Away."', with_message_id("Message-ID: <2@example.org>")),
    again("same-handle", ':handle "h" "Away."', ':handle "h" "Away again."'),
    again("another-handle", ':handle "h" "Away."', ':handle "i" "Away."'),
    again("handle-in-capitals", ':handle "h" "Away."', ':handle "H" "Away."'),
    again("handle-and-none", ':handle "h" "h"', '"h"'),
    again("handle-empty", ':handle "" "Away."', ':handle "" "Away."'),
    again("for-a-detail", '"Away."', ':addresses "username@example.com" "Away."', detail="d"),
    *(
        again(f"days-{days}", f':days {days} "Away."', f':days {days} "Away."')
        for days in ("0", "1", "7", "30", "365", "1000000", "4G")
    ),
    *(
        again(f"seconds-{seconds}", f':seconds {seconds} "Away."', f':seconds {seconds} "Away."')
        for seconds in ("0", "1", "60", "3600", "31536000")
    ),
    followed(
        sends(
            "vacation-again-variables",
            'if header :matches "subject" "*" { vacation :subject "Re: ${1}" "Away."; }',
            *("vacation", "variables"),
        ),
        sends(
            "",
            'if header :matches "subject" "*" { vacation :subject "Re: ${1}" "Away."; }',
            *("vacation", "variables"),
            message=with_subject("Subject: Another"),
        ),
    ),
    followed(away("again-after-none", message=with_field("Precedence: bulk")), away("")),
    followed(away("again-after-an-error", '"Away."; redirect ""'), away("")),
]

VACATION_COMMANDS = [
    away("days-and-seconds", ':days 1 :seconds 5 "Away."'),
    away("days-twice", ':days 1 :days 2 "Away."'),
    away("days-string", ':days "1" "Away."'),
    away("days-negative", ':days -1 "Away."'),
    away("tag-behind", '"Away." :days 5'),
    away("no-reason", ":days 5"),
    away("two-reasons", '"Away." "Away."'),
    away("reasons", '["Away."]'),
    away("unknown-tag", ':unknown "Away."'),
    away("handle-list", ':handle ["h"] "Away."'),
    away("subject-list", ':subject ["h"] "Away."'),
    away("from-wrong", ':from "not an address" "Away."'),
    away("from-two", ':from "a@example.net, b@example.net" "Away."'),
    away("from-empty", ':from "" "Away."'),
    away("addresses-list", ':addresses ["a@example.net", "b@example.net"] "Away."'),
    sends("vacation-not-required", 'vacation "Away."; discard;'),
    sends("vacation-seconds-not-required", 'vacation :seconds 5 "Away.";', "vacation"),
    sends("vacation-seconds-alone", 'vacation :seconds 5 "Away.";', "vacation-seconds"),
    sends("vacation-seconds-without-seconds", 'vacation "Away.";', "vacation-seconds"),
    sends("vacation-fcc-not-required", 'vacation :fcc "Sent" "Away."; discard;', "vacation"),
    sends("vacation-twice", 'vacation "One."; vacation "Two.";', "vacation"),
    sends("vacation-twice-the-same", 'vacation "One."; vacation "One.";', "vacation"),
    sends("vacation-twice-with-handles", 'vacation :handle "a" "x"; vacation :handle "b" "x";', "vacation"),
    sends("vacation-in-branches", 'if true { vacation "One."; } else { vacation "Two."; }', "vacation"),
    sends("vacation-and-discard", 'vacation "Away."; discard;', "vacation"),
    sends("vacation-and-keep", 'vacation "Away."; keep;', "vacation"),
    sends("vacation-and-stop", 'vacation "Away."; stop;', "vacation"),
    sends("vacation-and-fileinto", 'vacation "Away."; fileinto "f";', "vacation", "fileinto"),
    sends("vacation-and-redirect", 'redirect "a@example.net"; vacation "Away.";', "vacation"),
    sends("vacation-and-flags", 'setflag "\\\\Seen"; vacation "Away.";', "vacation", "imap4flags"),
    sends("vacation-then-an-error", 'vacation "Away."; fileinto "a//b";', "vacation", "fileinto"),
    sends("vacation-refused", 'vacation "Away.";', "vacation", refuse={"sender@example.org": "550 5.1.1 Unknown"}),
    sends(
        "vacation-refused-for-now", 'vacation "Away.";', "vacation", refuse={"sender@example.org": "451 4.3.0 Later"}
    ),
    beside(sends("vacation-before-and-own", 'vacation "Own.";', "vacation"), 'require "vacation"; vacation "Before.";'),
    beside(sends("vacation-own-and-after", 'vacation "Own.";', "vacation"), after='require "vacation"; vacation "x";'),
    beside(sends("vacation-before-and-discard", "discard;"), 'require "vacation"; vacation "Before.";'),
    beside(sends("vacation-after", ""), after='require "vacation"; vacation "After.";'),
    beside(sends("vacation-before-ends", "keep;"), 'require "vacation"; vacation "Before."; discard;'),
    beside(
        sends("vacation-before-and-an-error", 'fileinto "a//b";', "fileinto"),
        'require "vacation"; vacation "Before.";',
    ),
]


def refuses(
    name: str, commands: str, *capabilities: str, message: bytes = LETTER, sender: str = "s@example.org"
) -> Case:
    return sends(f"reject-{name}", commands, "reject", *capabilities, message=message, sender=sender)


REJECTS = [
    refuses("plain", 'reject "No, thanks.";'),
    refuses("utf8", 'reject "Nein, danke … für immer.";'),
    refuses("lines", "reject text:\nOne.\n..two\n\nThree.\n.\n;"),
    refuses("long-line", f'reject "{150 * "word "}end";'),
    refuses("null-sender-utf8", 'reject "Nö.";', sender=""),
    refuses("of-utf8", 'reject "No.";', message=with_subject("Subject: größe")),
    refuses("of-encoded", 'reject "No.";', message=with_subject("Subject: =?utf-8?q?gr=C3=B6=C3=9Fe?=")),
    refuses("no-subject", 'reject "No.";', message=with_subject()),
    refuses("no-message-id", 'reject "No.";', message=with_message_id()),
    refuses("edited", 'addheader "X-New" "y"; deleteheader "Subject"; reject "No.";', "editheader"),
    refuses("a-list", 'reject "No.";', message=with_field("List-Id: <x.example.org>")),
    refuses("bulk", 'reject "No.";', message=with_field("Precedence: bulk")),
    refuses("auto-submitted", 'reject "No.";', message=with_field("Auto-Submitted: auto-replied")),
    refuses("variables", 'set "a" "b"; reject "No ${a}.";', "variables"),
    refuses("and-stop", 'reject "No."; stop; keep;'),
    *(
        refuses(f"and-{name}", f'reject "No."; {command}', *("fileinto", "copy", "vacation", "imap4flags"))
        for name, command in {
            "fileinto": 'fileinto "f";',
            "fileinto-copy": 'fileinto :copy "f";',
            "redirect": 'redirect "a@example.net";',
            "redirect-copy": 'redirect :copy "a@example.net";',
            "vacation": 'vacation "Away.";',
            "reject": 'reject "Never.";',
            "keep": "keep;",
            "discard": "discard;",
            "flags": 'setflag "x";',
        }.items()
    ),
    *(
        refuses(f"behind-{name}", f'{command} reject "No.";', *("fileinto", "copy", "vacation"))
        for name, command in {
            "fileinto": 'fileinto "f";',
            "fileinto-copy": 'fileinto :copy "f";',
            "redirect": 'redirect "a@example.net";',
            "redirect-copy": 'redirect :copy "a@example.net";',
            "vacation": 'vacation "Away.";',
            "keep": "keep;",
            "discard": "discard;",
        }.items()
    ),
    refuses("in-branches", 'if true { reject "One."; } else { reject "Two."; }'),
    refuses("then-an-error", 'reject "No."; fileinto "a//b";', "fileinto"),
    refuses("no-reason", "reject;"),
    refuses("list", 'reject ["No."];'),
    refuses("tag", 'reject :copy "No.";', "copy"),
    sends("reject-not-required", 'reject "No.";'),
    beside(refuses("before", "reject text:\nNo.\n.\n;"), "keep;"),
    beside(refuses("and-after", 'reject "No.";'), after='require "fileinto"; fileinto "f";'),
    beside(refuses("both-before-and-own", 'reject "Own.";'), 'require "reject"; reject "Before.";'),
    beside(refuses("copied-before", 'reject "No.";'), 'require ["fileinto", "copy"]; fileinto :copy "f";'),
    beside(refuses("sent-on-before", 'reject "No.";'), 'require "copy"; redirect :copy "a@example.net";'),
    beside(sends("reject-of-the-site", 'redirect "a@example.net";'), 'require "reject"; reject "Before.";'),
    beside(sends("reject-after", ""), after='require "reject"; reject "After.";'),
    beside(refuses("answered-before", 'reject "No.";'), 'require "vacation"; vacation "Away.";'),
]


def erejects(name: str, commands: str) -> Case:
    """A message that is refused at once. Pigeonhole does not know how to, and has reject in the place of ereject."""
    ours, theirs = (
        require(*words, "fileinto", "vacation", "copy") + text
        for words, text in ((("reject", "ereject"), commands), (("reject",), commands.replace("ereject", "reject")))
    )
    return Case(f"ereject-{name}", ours, LETTER, theirs=theirs)


EREJECTS = [
    erejects("and-fileinto", 'ereject "No."; fileinto "f";'),
    erejects("and-fileinto-copy", 'ereject "No."; fileinto :copy "f";'),
    erejects("and-redirect", 'ereject "No."; redirect "a@example.net";'),
    erejects("and-vacation", 'ereject "No."; vacation "Away.";'),
    erejects("and-ereject", 'ereject "No."; ereject "Never.";'),
    erejects("and-reject", 'ereject "No."; reject "Never.";'),
    erejects("behind-reject", 'reject "No."; ereject "Never.";'),
    erejects("behind-fileinto", 'fileinto "f"; ereject "No.";'),
    erejects("behind-redirect-copy", 'redirect :copy "a@example.net"; ereject "No.";'),
    erejects("behind-vacation", 'vacation "Away."; ereject "No.";'),
    erejects("then-an-error", 'ereject "No."; redirect "";'),
    erejects("not-reached", 'stop; ereject "No.";'),
    erejects("no-reason", "ereject;"),
    erejects("list", 'ereject ["No."];'),
]


def tells(
    name: str, commands: str, *capabilities: str, message: bytes = LETTER, sender: str = "sender@example.org"
) -> Case:
    return sends(f"notify-{name}", commands, "enotify", *capabilities, message=message, sender=sender)


def checks(name: str, test: str, *capabilities: str) -> Case:
    """A test that decides between two folders."""
    return tells(name, f'if {test} {{ fileinto "yes"; }} else {{ fileinto "no"; }}', "fileinto", *capabilities)


NOTIFIES = [
    tells("plain", 'notify "mailto:a@example.net";'),
    tells("message", 'notify :message "New mail" "mailto:a@example.net";'),
    tells("message-utf8", 'notify :message "Neue Post für dich" "mailto:a@example.net";'),
    tells("message-long", f'notify :message "{30 * "word "}end" "mailto:a@example.net";'),
    tells("message-empty", 'notify :message "" "mailto:a@example.net";'),
    tells(
        "message-of-the-message",
        'if header :matches "subject" "*" { notify :message "[${1}]" "mailto:a@example.net"; }',
        "variables",
    ),
    *(
        tells(f"importance-{value}", f'notify :message "m" :importance "{value}" "mailto:a@example.net";')
        for value in "123"
    ),
    *(
        tells(f"importance-wrong-{name}", f'notify :importance "{value}" "mailto:a@example.net";')
        for name, value in {"zero": "0", "four": "4", "empty": "", "word": "high", "blank": "1 ", "zeros": "01"}.items()
    ),
    tells("importance-number", 'notify :importance 1 "mailto:a@example.net";'),
    tells("from", 'notify :message "m" :from "username@example.com" "mailto:a@example.net";'),
    tells("from-with-a-name", 'notify :message "m" :from "Jörg <username@example.com>" "mailto:a@example.net";'),
    tells("from-somebody-else", 'notify :message "m" :from "boss@example.org" "mailto:a@example.net";'),
    tells("from-wrong", 'notify :from "not an address" "mailto:a@example.net";'),
    tells("from-empty", 'notify :from "" "mailto:a@example.net";'),
    tells("from-wrong-variable", 'set "f" "no address"; notify :from "${f}" "mailto:a@example.net";', "variables"),
    tells("options", 'notify :message "m" :options "a=b" "mailto:a@example.net";'),
    tells("options-without-value", 'notify :options "a" "mailto:a@example.net";'),
    tells("subject", 'notify "mailto:a@example.net?subject=Alert";'),
    tells("subject-encoded", 'notify "mailto:a@example.net?subject=Gr%C3%B6%C3%9Fe%20x";'),
    tells("subject-and-message", 'notify :message "m" "mailto:a@example.net?subject=Alert";'),
    tells("body", 'notify :message "m" "mailto:a@example.net?body=Hello%20there";'),
    tells("body-utf8", 'notify :message "m" "mailto:a@example.net?body=Gr%C3%B6%C3%9Fe";'),
    tells("body-lines", 'notify :message "m" "mailto:a@example.net?body=one%0D%0Atwo";'),
    tells("plus", 'notify :message "m" "mailto:a+b@example.net?body=a+b";'),
    tells("to-and-cc", 'notify :message "m" "mailto:a@example.net?to=b@example.net&cc=c@example.net";'),
    tells("to-alone", 'notify :message "m" "mailto:?to=b@example.net";'),
    tells("bcc", 'notify :message "m" "mailto:a@example.net?bcc=b@example.net";'),
    tells("comma", 'notify :message "m" "mailto:a@example.net,b@example.net";'),
    tells("comma-encoded", 'notify :message "m" "mailto:a@example.net?cc=b@example.net%2Cc@example.net";'),
    tells("comma-in-cc", 'notify :message "m" "mailto:a@example.net?cc=b@example.net,c@example.net";'),
    tells("same-twice", 'notify :message "m" "mailto:a@example.net?cc=a@example.net";'),
    tells("to-nobody", 'fileinto "f"; notify :message "m" "mailto:";', "fileinto"),
    tells("capitals", 'notify :message "m" "MAILTO:a@example.net?SUBJECT=x&Body=y";'),
    tells("quoted", 'notify :message "m" "mailto:%22a%20b%22@example.net";'),
    tells("own-field", 'notify :message "m" "mailto:a@example.net?X-Own=yes%20it%20is";'),
    tells(
        "unsafe-fields",
        'notify :message "m" "mailto:a@example.net?From=evil@example.org&Auto-Submitted=no&Message-ID=x&Received=y'
        '&Date=z";',
    ),
    *(
        tells(f"wrong-{name}", f'fileinto "x"; notify :message "m" "{method}";', "fileinto")
        for name, method in {
            "field-name": "mailto:a@example.net?X%20Own=y",
            "field-line-end": "mailto:a@example.net?X-Own=y%0D%0AX-Evil:z",
            "percent": "mailto:a%zz@example.net",
            "percent-at-the-end": "mailto:a@example.net?body=%4",
            "address": "mailto:nobody",
            "blank": "mailto:a%20b@example.net",
            "fragment": "mailto:a@example.net#x",
            "xmpp": "xmpp:a@example.net",
            "tel": "tel:+1",
            "no-scheme": "a@example.net",
            "empty": "",
            "like-mailto": "mailtoo:a@example.net",
        }.items()
    ),
    *(
        tells(
            f"variable-{name}",
            f'set "m" "{method}"; fileinto "x"; notify :message "m" "${{m}}";',
            "fileinto",
            "variables",
        )
        for name, method in {
            "mailto": "mailto:a@example.net",
            "xmpp": "xmpp:a@example.net",
            "empty": "",
            "address": "mailto:nobody",
        }.items()
    ),
    tells("two", 'notify :message "m" "mailto:a@example.net"; notify :message "m" "mailto:b@example.net";'),
    tells("two-the-same", 2 * 'notify :message "m" "mailto:a@example.net";'),
    tells("five", "".join(f'notify :message "m" "mailto:a{number}@example.net";' for number in range(5))),
    tells("too-many", "".join(f'notify :message "m" "mailto:a{number}@example.net";' for number in range(33))),
    *(
        tells(
            f"and-{name}",
            f'notify :message "m" "mailto:a@example.net"; {command}',
            *("fileinto", "vacation", "reject"),
        )
        for name, command in {
            "discard": "discard;",
            "keep": "keep;",
            "stop": "stop;",
            "fileinto": 'fileinto "f";',
            "redirect": 'redirect "b@example.net";',
            "vacation": 'vacation "Away.";',
            "reject": 'reject "No.";',
            "an-error": 'fileinto "a//b";',
        }.items()
    ),
    tells("behind-reject", 'reject "No."; notify :message "m" "mailto:a@example.net";', "reject"),
    tells("null-sender", 'notify :message "m" "mailto:a@example.net";', sender=""),
    *(
        tells(f"of-{name}", 'notify :message "m" "mailto:a@example.net";', message=with_field(field))
        for name, field in {
            "auto-replied": "Auto-Submitted: auto-replied",
            "auto-notified": "Auto-Submitted: auto-notified; owner-email=x@example.org",
            "auto-submitted-no": "Auto-Submitted: no",
            "a-list": "List-Id: <x.example.org>",
            "bulk": "Precedence: bulk",
        }.items()
    ),
    tells("to-the-user", 'notify :message "m" "mailto:username@example.com";'),
    tells("to-the-sender", 'notify :message "m" "mailto:sender@example.org";'),
    replace(tells("again", 'notify :message "m" "mailto:a@example.net";'), times=2),
    replace(
        tells("refused", 'notify :message "m" "mailto:a@example.net"; fileinto "f";', "fileinto"),
        refuse={"a@example.net": "550 5.1.1 Unknown"},
    ),
    replace(
        tells("refused-for-now", 'notify :message "m" "mailto:a@example.net"; fileinto "f";', "fileinto"),
        refuse={"a@example.net": "451 4.3.0 Later"},
    ),
    tells("no-method", "notify;"),
    tells("list", 'notify ["mailto:a@example.net"];'),
    tells("tag-twice", 'notify :message "a" :message "b" "mailto:a@example.net";'),
    tells("unknown-tag", 'notify :unknown "mailto:a@example.net";'),
    sends("notify-not-required", 'notify "mailto:a@example.net"; discard;'),
    beside(
        tells("both-before-and-own", 'notify :message "m" "mailto:a@example.net";'),
        'require "enotify"; notify :message "m" "mailto:b@example.net";',
    ),
    beside(
        sends("notify-before-and-discard", "discard;"), 'require "enotify"; notify :message "m" "mailto:b@example.net";'
    ),
    *(
        checks(f"valid-{name}", f"valid_notify_method {methods}")
        for name, methods in {
            "mailto": '"mailto:a@example.net"',
            "two": '["mailto:a@example.net", "mailto:b@example.net"]',
            "not-all": '["mailto:a@example.net", "xmpp:a@example.net"]',
            "xmpp": '"xmpp:a@example.net"',
            "no-scheme": '"foo"',
            "empty": '""',
            "to-nobody": '"mailto:"',
            "address": '"mailto:nobody"',
            "capitals": '"MAILTO:a@example.net"',
            "field-name": '"mailto:a@example.net?X%20Y=z"',
        }.items()
    ),
    *(
        checks(f"capability-{name}", f"notify_method_capability {arguments}", "relational")
        for name, arguments in {
            "online": '"mailto:a@example.net" "online" "maybe"',
            "online-in-capitals": '"mailto:a@example.net" "ONLINE" "MAYBE"',
            "online-yes": '"mailto:a@example.net" "online" ["yes", "no"]',
            "contains": ':contains "mailto:a@example.net" "online" "ay"',
            "unknown": '"mailto:a@example.net" "foo" "maybe"',
            "unknown-count": ':count "eq" "mailto:a@example.net" "foo" "0"',
            "count": ':count "eq" "mailto:a@example.net" "online" "1"',
            "xmpp": '"xmpp:a@example.net" "online" "maybe"',
            "wrong": '"mailto:nobody" "online" "maybe"',
            "no-keys": '"mailto:a@example.net" "online"',
        }.items()
    ),
    *(
        tells(f"encodeurl-{name}", f'set {arguments}; fileinto "[${{v}}]";', "variables", "fileinto")
        for name, arguments in {
            "ascii": ':encodeurl "v" "a b?c&d=e#f"',
            "utf8": ':encodeurl "v" "ü€"',
            "unreserved": ':encodeurl "v" "A-Z_a~!*()"',
            "percent": ':encodeurl "v" "%41"',
            "empty": ':encodeurl "v" ""',
            "line-end": ':encodeurl "v" "a\r\nb"',
            "length": ':encodeurl :length "v" "a b"',
            "upper": ':upper :encodeurl "v" "a b"',
            "wildcards": ':quotewildcard :encodeurl "v" "a*b"',
            "twice": ':encodeurl :encodeurl "v" "a b"',
        }.items()
    ),
    sends("notify-encodeurl-not-required", 'set :encodeurl "v" "a b"; fileinto "[${v}]";', "variables", "fileinto"),
]


def filed(name: str, commands: str, without: str, message: bytes = LETTER, sender: str = "sender@example.org") -> Case:
    """A mail of which a copy is filed. without: the same where nobody knows how to file it."""
    words = ("vacation", "enotify", "fileinto", "imap4flags", "mailbox", "special-use", "variables")
    return Case(f"fcc-{name}", require(*words, "fcc") + commands, message, sender, theirs=require(*words) + without)


NOTIFY = 'notify :message "m" {}"mailto:a@example.net";'
# Each with the folders that have a copy, and its flags.
COPIES: list[tuple[Case, dict[str, tuple[str, ...]]]] = [
    (filed("vacation", 'vacation :fcc "Sent" "Away.";', 'vacation "Away.";'), {"Sent": ()}),
    (filed("utf8", 'vacation :fcc "Sent" "größe";', 'vacation "größe";'), {"Sent": ()}),
    (
        filed(
            "mime",
            'vacation :mime :fcc "Sent" "Content-Type: text/html\r\n\r\n<b>x</b>";',
            'vacation :mime "Content-Type: text/html\r\n\r\n<b>x</b>";',
        ),
        {"Sent": ()},
    ),
    (filed("notify", NOTIFY.format(':fcc "Sent" '), NOTIFY.format("")), {"Sent": ()}),
    (filed("inbox", 'vacation :fcc "INBOX" "Away.";', 'vacation "Away.";'), {"INBOX": ()}),
    (filed("utf8-folder", 'vacation :fcc "Größe" "Away.";', 'vacation "Away.";'), {"Größe": ()}),
    (filed("level", 'vacation :fcc "a/b" "Away.";', 'vacation "Away.";'), {"a/b": ()}),
    (filed("create", 'vacation :fcc "New" :create "Away.";', 'vacation "Away.";'), {"New": ()}),
    (
        filed("flags", 'vacation :fcc "Sent" :flags ["\\\\Seen", "done"] "Away.";', 'vacation "Away.";'),
        {"Sent": (r"\Seen", "done")},
    ),
    (
        filed("flags-in-one", 'vacation :flags "\\\\Seen done" :fcc "Sent" "Away.";', 'vacation "Away.";'),
        {"Sent": (r"\Seen", "done")},
    ),
    (
        filed("notify-flags", NOTIFY.format(':fcc "Sent" :flags "\\\\Seen" '), NOTIFY.format("")),
        {"Sent": (r"\Seen",)},
    ),
    (
        filed("special-use", 'vacation :fcc "Other" :specialuse "\\\\Trash" "Away.";', 'vacation "Away.";'),
        {"Other": ()},
    ),
    (
        followed(
            filed("special-use-that-is-there", 'fileinto "Trash";', 'fileinto "Trash";'),
            filed("", 'vacation :fcc "Other" :specialuse "\\\\Trash" "Away.";', 'vacation "Away.";'),
        ),
        {"Trash": ()},
    ),
    (
        filed("beside-the-message", 'fileinto "f"; vacation :fcc "f" "Away.";', 'fileinto "f"; vacation "Away.";'),
        {"f": ()},
    ),
    (filed("and-discard", 'discard; vacation :fcc "Sent" "Away.";', 'discard; vacation "Away.";'), {"Sent": ()}),
    (
        filed(
            "variables",
            'set "f" "Sent"; vacation :fcc "${f}" "Away.";',
            'vacation "Away.";',
        ),
        {"Sent": ()},
    ),
    (
        filed(
            "both",
            'vacation :fcc "One" "Away.";' + NOTIFY.format(':fcc "Two" '),
            'vacation "Away.";' + NOTIFY.format(""),
        ),
        {"One": (), "Two": ()},
    ),
    (filed("no-answer", 'vacation :fcc "Sent" "Away.";', 'vacation "Away.";', sender=""), {}),
    (
        filed("no-answer-to-a-list", 'vacation :fcc "Sent" "Away.";', 'vacation "Away.";', with_field("List-Id: <x>")),
        {},
    ),
    (
        filed(
            "no-notice", NOTIFY.format(':fcc "Sent" '), NOTIFY.format(""), with_field("Auto-Submitted: auto-generated")
        ),
        {},
    ),
    (
        replace(
            filed("refused", 'vacation :fcc "Sent" "Away.";', 'vacation "Away.";'),
            refuse={"sender@example.org": "550 5.1.1 Unknown"},
        ),
        {},
    ),
    (replace(filed("again", 'vacation :fcc "Sent" "Away.";', 'vacation "Away.";'), times=2), {"Sent": ()}),
]

FCC_ERRORS = [
    filed("flags-alone", 'vacation :flags "x" "Away.";', 'vacation :unknown "Away.";'),
    filed("create-alone", 'vacation :create "Away.";', 'vacation :unknown "Away.";'),
    filed("special-use-alone", 'vacation :specialuse "\\\\Sent" "Away.";', 'vacation :unknown "Away.";'),
    filed("twice", 'vacation :fcc "a" :fcc "b" "Away.";', 'vacation :unknown "Away.";'),
    filed("list", 'vacation :fcc ["a"] "Away.";', 'vacation :unknown "Away.";'),
    filed("without-a-folder", 'vacation :fcc :create "Away.";', 'vacation :unknown "Away.";'),
    filed("of-a-redirect", 'redirect :fcc "a" "a@example.net";', 'redirect :unknown "a@example.net";'),
    filed("of-fileinto", 'fileinto :fcc "a" "b";', 'fileinto :unknown "b";'),
    filed("of-keep", 'keep :fcc "a";', "keep :unknown;"),
]

CASES = [
    *REDIRECTS,
    *VACATION_TEXTS,
    *VACATION_CONDITIONS,
    *VACATION_INTERVALS,
    *VACATION_COMMANDS,
    *REJECTS,
    *EREJECTS,
    *NOTIFIES,
    *FCC_ERRORS,
]
