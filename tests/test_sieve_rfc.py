"""The examples of the RFCs on Sieve, each with messages for all that may come of it.

redirect, vacation, reject and notify have tests of their own: an example that has one of them has a fileinto or a
discard in its place here. Where an example is only a test or a string, it stands in the smallest script around it.
Obvious misprints are corrected. The separator of folders is the dot in most examples, and so it is here.
"""

from __future__ import annotations

import email.header
import email.utils
import time
from typing import NamedTuple, Union

import pytest
from harness import Site
from sieve import LETTER, Outcome, Sieve, script_text

# Where the message is to be: the folder; "" for none; several with bars between them; or each folder with its flags.
Wanted = Union[str, dict[str, str]]


class Case(NamedTuple):
    wanted: Wanted
    message: str
    sender: str
    detail: str


class Example(NamedTuple):
    """A script of an RFC. others: what it includes, the site's by "/NAME"."""

    place: str
    script: str
    cases: tuple[Case, ...]
    others: dict[str, str]
    options: dict[str, str]


EXAMPLES: list[Example] = []


def case(wanted: Wanted, message: str = LETTER, sender: str = "sender@example.org", detail: str = "") -> Case:
    return Case(wanted, message, sender, detail)


def example(
    place: str, script: str, *cases: Case, others: dict[str, str] | None = None, options: dict[str, str] | None = None
) -> None:
    EXAMPLES.append(Example(place, script, cases, others or {}, options or {}))


def mail(*fields: str, body: str = "A body.\n") -> str:
    """A message with these header fields."""
    return "\n".join([*fields, "", body])


def placed(wanted: Wanted) -> dict[str, str]:
    """The folders and flags, as Outcome.placed has them."""
    if isinstance(wanted, str):
        return dict.fromkeys(filter(None, wanted.split("|")), "")
    return {folder: " ".join(sorted(flags.split())) for folder, flags in wanted.items()}


def verify(outcome: Outcome, wanted: Wanted) -> None:
    assert outcome.errors == []
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == placed(wanted)
    assert outcome.is_discarded == (not outcome.placed)


def sieve_of(site: Site, **options: str) -> Sieve:
    return Sieve(site, **{"unixhierarchysep": "no", **options})


def holds(site: Site, requires: str, test: str, message: str = LETTER, sender: str = "sender@example.org") -> bool:
    """Whether a test is true for a message."""
    script = script_text(f"fileinto {requires}", f'if {test} {{ fileinto "yes"; }} else {{ fileinto "no"; }}')
    outcome = sieve_of(site).run(script, message, sender)
    assert outcome.errors == []
    [folder] = outcome.folders
    return {"yes": True, "no": False}[folder]


def value_of(site: Site, requires: str, commands: str, value: str, message: str = LETTER) -> str:
    """What a string is after these commands."""
    script = script_text(f"editheader {requires}", f'{commands}\naddheader "X-Value" "<{value}>";')
    outcome = sieve_of(site).run(script, message)
    assert outcome.errors == []
    assert list(outcome.folders) == ["INBOX"]
    field = outcome.message.header("X-Value")
    assert field
    shown = str(email.header.make_header(email.header.decode_header(field)))
    assert shown[0] + shown[-1] == "<>"
    return shown[1:-1]


# RFC 5228: the base. Its messages A and B.

A = """\
Date: Tue, 1 Apr 1997 09:06:31 -0800 (PST)
From: coyote@desert.example.org
To: roadrunner@acme.example.com
Subject: I have a present for you

Look, I'm sorry about the whole anvil thing, and I really
didn't mean to try and drop it on you from the top of the
cliff.
--
Wile E. Coyote   "Super Genius"   coyote@desert.example.org
"""
B = """\
From: youcouldberich!@reply-by-postal-mail.invalid
Sender: b1ff@de.res.example.com
To: rube@landru.example.com
Date:  Mon, 31 Mar 1997 18:26:10 -0800
Subject: $$$ YOU, TOO, CAN BE A MILLIONAIRE! $$$

YOU MAY HAVE ALREADY WON TEN MILLION DOLLARS, BUT I DOUBT
IT!  SO JUST POST THIS TO SIX HUNDRED NEWSGROUPS!
"""
LARGE = mail("From: someone@example.org", "Subject: large", body="0123456789abcde\n" * 10_000)
HUGE = mail("From: someone@example.org", "Subject: huge", body="0123456789abcde\n" * 70_000)

example(
    "rfc5228-2.3-hash",
    "if size :over 100k { # this is a comment\n   discard;\n}\n",
    case("INBOX"),
    case("", LARGE),
)
example(
    "rfc5228-2.3-bracket",
    """if size :over 100K { /* this is a comment
   this is still a comment */ discard /* this is a comment
   */ ;
}
""",
    case("INBOX"),
    case("", LARGE),
)
example(
    "rfc5228-2.4.2.1",
    """require "fileinto";
if header :contains ["To", "Cc"] ["me@example.com", "me00@landru.example.com"] { fileinto "me"; }
""",
    case("me", mail("To: me@example.com")),
    case("me", mail("To: x@example.com", "Cc: A <me00@landru.example.com>")),
    case("INBOX", mail("To: x@example.com")),
    case("INBOX", mail("Bcc: me@example.com")),
)
example(
    "rfc5228-2.4.2.4",
    """require "encoded-character";
if header :contains "Subject" "$${hex:24 24}" {
   discard;
}
""",
    case("INBOX", A),
    case("", B),
)
example(
    "rfc5228-2.5.1",
    """if anyof (not exists ["From", "Date"],
          header :contains "from" "fool@example.com") {
   discard;
}
""",
    case("INBOX", A),
    case("INBOX", B),
    case("", mail("Date: Mon, 31 Mar 1997 18:26:10 -0800")),
    case("", mail("From: fool@example.com", "Date: Mon, 31 Mar 1997 18:26:10 -0800")),
)
example(
    "rfc5228-2.7.3",
    """if header :contains :comparator "i;octet" "Subject"
      "MAKE MONEY FAST" {
   discard;
}
""",
    case("", mail("Subject: You can MAKE MONEY FAST")),
    case("INBOX", mail("Subject: You can Make Money Fast")),
)
example("rfc5228-2.10.2", "if size :over 500K { discard; }\n", case("INBOX", A), case("INBOX", B), case("", HUGE))
example(
    "rfc5228-2.10.3",
    'require "fileinto";\nfileinto "twice"; fileinto "twice"; keep; fileinto "INBOX"; keep;\n',
    case("twice|INBOX"),
)
example(
    "rfc5228-3.1-if",
    """require "fileinto";
if header :contains "from" "coyote" {
   discard;
} elsif header :contains ["subject"] ["$$$"] {
   discard;
} else {
   fileinto "INBOX";
}
""",
    case("", A),
    case("", B),
    case("INBOX"),
)
example(
    "rfc5228-3.1-elsif",
    """require "fileinto";
if header :contains ["From"] ["coyote"] {
   fileinto "acm";
} elsif header :contains "Subject" "$$$" {
   fileinto "postmaster";
} else {
   fileinto "field";
}
""",
    case("acm", A),
    case("postmaster", B),
    case("field"),
)
example("rfc5228-3.2-list", 'require ["fileinto", "envelope"];\nfileinto "x";\n', case("x"))
example("rfc5228-3.2-two", 'require "fileinto";\nrequire "envelope";\nfileinto "x";\n', case("x"))
example(
    "rfc5228-3.3",
    'require "fileinto";\nif header :contains "from" "coyote" { stop; }\nfileinto "x"; stop; fileinto "y";\n',
    case("INBOX", A),
    case("x", B),
)
example(
    "rfc5228-4.1",
    """require "fileinto";
if header :contains ["from"] "coyote" {
   fileinto "INBOX.harassment";
}
""",
    case("harassment", A),
    case("INBOX", B),
)
example("rfc5228-4.1-utf7", 'require "fileinto";\nfileinto "odds & ends";\n', case("odds & ends"))
example("rfc5228-4.3-keep", "if size :under 1M { keep; } else { discard; }\n", case("INBOX", A), case("", HUGE))
example("rfc5228-4.3-not", "if not size :under 1M { discard; }\n", case("INBOX", A), case("", HUGE))
example(
    "rfc5228-4.4",
    'if header :contains ["from"] ["idiot@example.com"] {\n   discard;\n}\n',
    case("", mail("From: An idiot <idiot@example.com>")),
    case("INBOX"),
)
example("rfc5228-4.4-fileinto", 'require "fileinto";\nfileinto "x"; discard;\n', case("x"))
example("rfc5228-4.4-keep", "discard; keep; discard;\n", case("INBOX"))
example(
    "rfc5228-5.1",
    'if address :is :all "from" "tim@example.com" {\n   discard;\n}\n',
    case("", mail("From: tim@example.com")),
    case("", mail('From: "Tim" (the one) <TIM@Example.Com>')),
    case("", mail("From: group: tim@example.com, tom@example.com;")),
    case("INBOX", mail('From: "tim@example.com" <tom@example.com>')),
    case("INBOX", mail("From: tom@example.com (tim@example.com)")),
)
example(
    "rfc5228-5.4",
    """require "envelope";
if envelope :all :is "from" "tim@example.com" {
   discard;
}
""",
    case("", sender="tim@example.com"),
    case("", sender="@a.example,@b.example:tim@example.com"),
    case("INBOX", mail("From: tim@example.com")),
    case("INBOX", mail("From: tim@example.com"), sender=""),
)
example(
    "rfc5228-5.5",
    """if not exists ["From","Date"] {
   discard;
}
""",
    case("INBOX", A),
    case("", mail("Date: Mon, 31 Mar 1997 18:26:10 -0800")),
)
example(
    "rfc5228-9",
    """#
# Example Sieve Filter
# Declare any optional features or extension used by the script
#
require ["fileinto"];

#
# Handle messages from known mailing lists
# Move messages from IETF filter discussion list to filter mailbox
#
if header :is "Sender" "owner-ietf-mta-filters@imc.org"
        {
        fileinto "filter";  # move to "filter" mailbox
        }
#
# Keep all messages to or from people in my company
#
elsif address :DOMAIN :is ["From", "To"] "example.com"
        {
        keep;               # keep in "In" mailbox
        }

#
# Try and catch unsolicited email.  If a message is not to me,
# or it contains a subject known to be spam, file it away.
#
elsif anyof (NOT address :all :contains
               ["To", "Cc", "Bcc"] "me@example.com",
             header :matches "subject"
               ["*make*money*fast*", "*university*dipl*mas*"])
        {
        fileinto "spam";   # move to "spam" mailbox
        }
else
        {
        # Move all other (non-company) mail to "personal"
        # mailbox.
        fileinto "personal";
        }
""",
    case("filter", mail("Sender: owner-ietf-mta-filters@imc.org", "To: me@example.com")),
    case("INBOX", mail("From: x@example.org", "To: you@example.com")),
    case("INBOX", mail("From: Boss <boss@EXAMPLE.com>", "To: x@example.org")),
    case("spam", A),
    case("spam", mail("From: x@example.org", "Cc: me@example.com.invalid", "Subject: Make your money fast!")),
    case("personal", mail("From: x@example.org", "Cc: me@example.com.invalid", "Subject: hello")),
)

# RFC 5229: variables.

example(
    "rfc5229-3.1-encoded",
    """require ["encoded-character", "variables"];
set "name" "Ethelbert";
if header :contains "Subject" "dear${hex:20 24 7b 4e}ame}" {
    # the test string is "dear Ethelbert"
    discard;
}
""",
    case("", mail("Subject: My dear Ethelbert!")),
    case("INBOX", mail("Subject: My dear ${name}!")),
)
LISTS = """require ["fileinto", "variables"];

if header :matches "List-ID" "*<*@*" {
    fileinto "INBOX.lists.${2}"; stop;
}

# Imagine the header
# Subject: [acme-users] [fwd] version 1.0 is out
if header :matches "Subject" "[*] *" {
    # ${1} will hold "acme-users",
    # ${2} will hold "[fwd] version 1.0 is out"
    fileinto "INBOX.lists.${1}"; stop;
}

# Imagine the header
# To: coyote@ACME.Example.COM
if address :matches ["To", "Cc"] ["coyote@**.com",
        "wile@**.com"] {
    # ${0} is the matching address
    # ${1} is always the empty string
    # ${2} is part of the domain name ("ACME.Example")
    fileinto "INBOX.business.${2}"; stop;
} else {
    # Control wouldn't reach this block if any match was
    # successful, so no match variables are set at this
    # point.
    if not string "${0}${1}${2}" "" { fileinto "wrong"; }
}

if anyof (true, address :domain :matches "To" "*.com") {
    # The second test is never evaluated, so there are
    # still no match variables set.
    if not string "${0}${1}" "" { fileinto "wrong"; }
    stop;
}
"""
example(
    "rfc5229-3.2",
    LISTS,
    case("lists/sieve", mail("List-ID: The list <sieve@ietf.org>")),
    case("lists/acme-users", mail("Subject: [acme-users] [fwd] version 1.0 is out")),
    case("business/ACME/Example", mail("To: coyote@ACME.Example.COM")),
    case("business/x", mail("Cc: Wile <wile@x.com>")),
    case("INBOX", mail("To: roadrunner@acme.example.com")),
)
example(
    "rfc5229-5",
    """require ["fileinto", "variables"];
set "state" "${state} pending";
if string :matches " ${state} " "* pending *" {
    # the above test always succeeds
    fileinto "ok";
}
""",
    case("ok"),
)

# RFC 5231: relational.

example(
    "rfc5231-7",
    """require ["relational", "comparator-i;ascii-numeric", "fileinto"];

if header :value "lt" :comparator "i;ascii-numeric"
          ["x-priority"] ["3"]
{
   fileinto "Priority";
}

elsif address :count "gt" :comparator "i;ascii-numeric"
           ["to"] ["5"]
{
   # everything with more than 5 recipients in the "to" field
   # is considered SPAM
   fileinto "SPAM";
}

elsif address :value "gt" :all :comparator "i;ascii-casemap"
           ["from"] ["M"]
{
   fileinto "From N-Z";
} else {
   fileinto "From A-M";
}

if allof ( address :count "eq" :comparator "i;ascii-numeric"
                   ["to", "cc"] ["1"] ,
           address :all :comparator "i;ascii-casemap"
                   ["to", "cc"] ["me@foo.example.com"] )
{
   fileinto "Only me";
}
""",
    case("Priority", mail("X-Priority: 1 (highest)", "From: zoe@example.org")),
    case("From N-Z", mail("X-Priority: 3", "From: zoe@example.org")),
    case("From N-Z", mail("X-Priority: highest", "From: zoe@example.org")),
    case("From A-M", mail("X-Priority: 20", "From: Adam@example.org")),
    case("SPAM", mail("To: a@x, b@x, c: d@x, e@x;, f@x, g@x", "From: adam@example.org")),
    case("From A-M", mail("To: a@x, b@x, c: d@x, e@x;, f@x", "From: adam@example.org")),
    case("From A-M|Only me", mail("To: Me <me@foo.example.com>", "From: adam@example.org")),
    case("From A-M", mail("To: me@foo.example.com", "Cc: me@foo.example.com", "From: adam@example.org")),
)

# RFC 5233: subaddress. Our user is jane, not ken; the first user is there for the name that she has not.

example(
    "rfc5233-4",
    """require ["envelope", "subaddress", "fileinto"];

# File all messages to postmaster into a single mailbox,
# ignoring the :detail part.
if envelope :user "to" "postmaster" {
    fileinto "inbox.postmaster";
    stop;
}

# File mailing list messages (subscribed as "ken+mta-filters").
if envelope :detail "to" "mta-filters" {
    fileinto "inbox.ietf-mta-filters";
}

# Redirect all mail sent to "ken+foo".
if envelope :detail "to" "foo" {
    fileinto "net";
}
""",
    case("INBOX"),
    case("ietf-mta-filters", detail="mta-filters"),
    case("net", detail="foo"),
    case("INBOX", detail="bar"),
)
example(
    "rfc5233-4-user",
    'require ["envelope", "subaddress", "fileinto"];\nif envelope :user "to" "jane" { fileinto "user"; }\n',
    case("user"),
    case("user", detail="x+y"),
)

# RFC 3894: copy.

example(
    "rfc3894-1",
    """require "fileinto";
fileinto "unfiltered";
keep;

if header "Subject" "MAKE MONEY FAST!!!"
{
        discard;
}
""",
    case("unfiltered|INBOX"),
    case("unfiltered|INBOX", mail("Subject: MAKE MONEY FAST!!!")),
)
example(
    "rfc3894-3",
    """require ["copy", "fileinto"];
fileinto :copy "incoming";

# ... more processing follows ...
if header "Subject" "MAKE MONEY FAST!!!" { discard; }
""",
    case("incoming|INBOX"),
    case("incoming", mail("Subject: MAKE MONEY FAST!!!")),
)

# RFC 5232: imap4flags.

example(
    "rfc5232-3.1-setflag",
    'require "imap4flags";\nif size :over 500K {\n    setflag "\\\\Deleted";\n}\n',
    case({"INBOX": ""}),
    case({"INBOX": r"\Deleted"}, HUGE),
)
example(
    "rfc5232-3.1-variable",
    """require ["fileinto", "imap4flags", "variables"];
if header :contains "from" "boss@frobnitzm.example.edu" {
    setflag "flagvar" "\\\\Flagged";
    fileinto :flags "${flagvar}" "INBOX.From Boss";
}
""",
    case({"INBOX": ""}),
    case({"From Boss": r"\Flagged"}, mail("From: boss@frobnitzm.example.edu")),
)
for number, flags in enumerate(
    (
        'addflag "flagvar" "\\\\Deleted";\naddflag "flagvar" "\\\\Answered";',
        'addflag "flagvar" ["\\\\Deleted", "\\\\Answered"];',
        'addflag "flagvar" "\\\\Deleted \\\\Answered";',
        'addflag "flagvar" "\\\\Answered \\\\Deleted";',
        'addflag "flagvar" ["", "  \\\\Answered   \\\\answered  ", "\\\\Recent", "\\\\DELETED", "n\u00f6"];',
    )
):
    example(
        f"rfc5232-3.2-addflag-{number}",
        f'require ["imap4flags", "variables"];\n{flags}\nkeep :flags "${{flagvar}}";\n',
        case({"INBOX": r"\Deleted \Answered"}),
    )
example(
    "rfc5232-3.3",
    """require ["fileinto", "imap4flags", "variables"];
if header :contains "Disposition-Notification-To"
   "mel@example.com" {
    addflag "flagvar" "$MDNRequired";
}
if header :contains "from" "imap@cac.washington.example.edu" {
    removeflag "flagvar" "$mdnrequired";
    fileinto :flags "${flagvar}" "INBOX.imap-list";
} else {
    keep :flags "${flagvar}";
}
""",
    case({"INBOX": ""}),
    case({"INBOX": "$MDNRequired"}, mail("Disposition-Notification-To: mel@example.com")),
    case(
        {"imap-list": ""},
        mail("Disposition-Notification-To: mel@example.com", "From: imap@cac.washington.example.edu"),
    ),
)
example(
    "rfc5232-3-last-wins",
    """require ["fileinto", "imap4flags"];
fileinto :flags "\\\\Seen" "a";
fileinto :flags "\\\\Flagged" "a";
setflag "\\\\Answered";
fileinto "b";
setflag "";
""",
    case({"a": r"\Flagged", "b": r"\Answered"}),
)
BOSS, GRANDMA = "From: boss@company.example.com", "From: grandma@example.net"
example(
    "rfc5232-9",
    """#
# Example Sieve Filter
# Declare any optional features or extension used by the script
#
require ["fileinto", "imap4flags", "variables"];

#
# Move large messages to a special mailbox
#
if size :over 1M
        {
        addflag "MyFlags" "Big";
        if header :is "From" "boss@company.example.com"
                   {
# The message will be marked as "\\Flagged Big" when filed into
# mailbox "Big messages"
                   addflag "MyFlags" "\\\\Flagged";
                   }
        fileinto :flags "${MyFlags}" "Big messages";
        }

if header :is "From" "grandma@example.net"
        {
        addflag "MyFlags" ["\\\\Answered", "$MDNSent"];
# If the message is bigger than 1Mb it will be marked as
# "Big \\Answered $MDNSent" when filed into mailbox "grandma".
# If the message is shorter than 1Mb it will be marked as
# "\\Answered $MDNSent"
        fileinto :flags "${MyFlags}" "GrandMa";
        }

#
# Handle messages from known mailing lists
# Move messages from IETF filter discussion list to filter folder
#
if header :is "Sender" "owner-ietf-mta-filters@example.org"
        {
        set "MyFlags" "\\\\Flagged $Work";
# Message will have both "\\Flagged" and $Work flags
        keep :flags "${MyFlags}";
        }

#
# Keep all messages to or from people in my company
#
elsif anyof (address :domain :is ["From", "To"] "company.example.com")
        {
        keep :flags "${MyFlags}"; # keep in "Inbox" folder
        }

# Try to catch unsolicited email.  If a message is not to me,
# or it contains a subject known to be spam, file it away.
#
elsif anyof (not address :all :contains
               ["To", "Cc"] "me@company.example.com",
             header :matches "subject"
               ["*make*money*fast*", "*university*dipl*mas*"])
        {
        removeflag "MyFlags" "\\\\Flagged";
        fileinto :flags "${MyFlags}" "spam";
        }
else
        {
        # Move all other external mail to "personal"
        # folder.
        fileinto :flags "${MyFlags}" "personal";
        }
""",
    case({"INBOX": r"\Flagged $Work"}, mail("Sender: owner-ietf-mta-filters@example.org")),
    case({"INBOX": ""}, mail(BOSS)),
    case({"Big messages": r"\Flagged Big", "INBOX": r"\Flagged Big"}, HUGE.replace("From: someone@example.org", BOSS)),
    case({"GrandMa": r"\Answered $MDNSent", "spam": r"\Answered $MDNSent"}, mail(GRANDMA)),
    case(
        dict.fromkeys(("Big messages",), "Big") | dict.fromkeys(("GrandMa", "spam"), r"Big \Answered $MDNSent"),
        HUGE.replace("From: someone@example.org", GRANDMA),
    ),
    case({"spam": ""}, A),
    case({"personal": ""}, mail("From: x@example.org", "Cc: me@company.example.com.invalid")),
)

# RFC 5173: body.

MONEY = "\n".join(
    [
        "Subject: x",
        "MIME-Version: 1.0",
        "Content-Type: multipart/mixed; boundary=b",
        "",
        "--b",
        "Content-Type: text/plain; name=MAKE-MONEY-FAST",
        "",
        "text",
        "--b--",
        "",
    ]
)
example(
    "rfc5173-5.1",
    """require "body";

# This will match a message containing the literal text
# "MAKE MONEY FAST" in body parts (ignoring any
# content-transfer-encodings) or MIME headers other than
# the outermost RFC 2822 header.

if body :raw :contains "MAKE MONEY FAST" {
        discard;
}
""",
    case("INBOX", mail("Subject: MAKE MONEY FAST")),
    case("", mail("Subject: x", body="Now you may make money fast, too.\n")),
    case("", MONEY.replace("MAKE-MONEY-FAST", '"MAKE MONEY FAST"')),
    case("INBOX", mail("Content-Transfer-Encoding: base64", body="TUFLRSBNT05FWSBGQVNUCg==\n")),
)
example(
    "rfc5173-5.2",
    """require ["body", "fileinto"];

# Save any message with any text MIME part that contains the
# words "missile" or "coordinates" in the "secrets" folder.

if body :content "text" :contains ["missile", "coordinates"] {
        fileinto "secrets";
}

# Save any message with an audio/mp3 MIME part in
# the "jukebox" folder.

if body :content "audio/mp3" :contains "" {
        fileinto "jukebox";
}
""",
    case("INBOX"),
    case("secrets", mail("Subject: x", body="The missiles are ready.\n")),
    case("secrets", mail("Content-Type: text/html", body="<p>new co=ordinates, new coordinates</p>\n")),
    case("secrets", mail("Content-Transfer-Encoding: quoted-printable", body="new coord=\ninates\n")),
    case("jukebox", mail("Content-Type: audio/mp3", "Content-Transfer-Encoding: base64", body="AAAA\n")),
    case("jukebox|secrets", MONEY.replace("text\n", "missile\n--b\nContent-Type: audio/mp3\n\nx\n")),
)
example(
    "rfc5173-5.3",
    """require ["body", "fileinto"];

# Save messages mentioning the project schedule in the
# project/schedule folder.
if body :text :contains "project schedule" {
        fileinto "project/schedule";
}
""",
    case("project/schedule", mail("Subject: x", body="Here is the project schedule:\n")),
    case("project/schedule", mail("Content-Type: text/html; charset=utf-8", body="<p>Project Schedule</p>\n")),
    case("INBOX", mail("Subject: project schedule", body="Here it is.\n")),
    options={"unixhierarchysep": "yes"},
)

# RFC 5260: date and index.

SATURDAY = "Received: from a by b with LMTP;\n Sat, 21 Nov 2026 12:00:00 +0000"
THURSDAY = "Received: from a by b with LMTP; Thu, 19 Nov 2026 12:00:00 +0000"
example(
    "rfc5260-4.4-date",
    """require ["date", "relational", "fileinto"];
if allof(header :is "from" "boss@example.com",
         date :value "ge" :originalzone "date" "hour" "09",
         date :value "lt" :originalzone "date" "hour" "17")
{ fileinto "urgent"; }
""",
    case("urgent", mail("From: boss@example.com", "Date: Tue, 1 Apr 1997 09:00:00 -0800 (PST)")),
    case("urgent", mail("From: boss@example.com", "Date: 1 Apr 1997 16:59:59 +1345")),
    case("INBOX", mail("From: boss@example.com", "Date: Tue, 1 Apr 1997 17:00:00 -0800")),
    case("INBOX", mail("From: boss@example.com", "Date: Tue, 1 Apr 1997 08:59 -0800")),
    case("INBOX", mail("From: boss@example.com", "Date: Tue, 31 Feb 1997 10:59 -0800")),
    case("INBOX", mail("From: x@example.com", "Date: Tue, 1 Apr 1997 10:00:00 -0800")),
)
example(
    "rfc5260-4.4-received",
    """require ["date", "relational", "fileinto"];
if anyof(date :is "received" "weekday" "0",
         date :is "received" "weekday" "6")
{ fileinto "weekend"; }
""",
    case("weekend", mail(SATURDAY, THURSDAY)),
    case("INBOX", mail(THURSDAY, SATURDAY)),
)
example(
    "rfc5260-5.1-period",
    """require ["date", "relational", "fileinto"];
if allof(currentdate :value "ge" "date" "2007-06-30",
         currentdate :value "le" "date" "2007-07-07")
{ fileinto "away"; }
""",
    case("INBOX"),
)
example(
    "rfc5260-6.1",
    """# Implement the Internet-Draft cutoff date check assuming the
# second Received: field specifies when the message first
# entered the local email infrastructure.
require ["date", "relational", "index", "fileinto"];
if date :value "gt" :index 2 :zone "-0500" "received"
        "iso8601" "2007-02-26T09:00:00-05:00"
{ fileinto "aftercutoff"; }
""",
    case("aftercutoff", mail(THURSDAY, "Received: from a by b; Mon, 26 Feb 2007 14:00:01 +0000")),
    case("INBOX", mail(THURSDAY, "Received: from a by b; Mon, 26 Feb 2007 13:59:59 +0000", THURSDAY)),
    case("INBOX", mail(THURSDAY)),
)

# RFC 6609: include.

ALWAYS_ALLOW = """\
if address :is "from" "boss@example.com"
{
    keep;
}
elsif address :is "from" "ceo@example.com"
{
    keep;
}
"""
SPAM_TESTS = """\
if header :contains "Subject" "XXXX"
{
    discard;
}
elsif address :is "from" "money@example.com"
{
    discard;
}
"""
MAILING_LISTS = """\
require ["fileinto"];

if header :is "List-ID" "sieve.ietf.org"
{
    fileinto "lists.sieve";
}
elsif header :is "List-ID" "ietf-imapext.imc.org"
{
    fileinto "lists.imapext";
}
"""
SITE_SPAM_TESTS = """\
if anyof (header :contains "Subject" "$$",
          header :contains "Subject" "Make money")
{
    discard;
}
"""
example(
    "rfc6609-3.2",
    """require ["include"];

include :personal "always_allow";
include :global "spam_tests";
include :personal "spam_tests";
include :personal "mailing_lists";
""",
    case("INBOX"),
    case("INBOX", mail("From: boss@example.com", "Subject: Make money")),
    case("INBOX", mail("From: CEO <ceo@example.com>", "Subject: XXXX")),
    case("", mail("From: x@example.com", "Subject: Make money")),
    case("", mail("From: x@example.com", "Subject: a lot of $$")),
    case("", mail("From: x@example.com", "Subject: XXXX")),
    case("", mail("From: money@example.com", "Subject: x")),
    case("lists/sieve", mail("From: x@example.com", "List-ID: sieve.ietf.org")),
    case("lists/imapext", mail("From: x@example.com", "Subject: XXXX", "List-ID: ietf-imapext.imc.org")),
    others={
        "always_allow": ALWAYS_ALLOW,
        "spam_tests": SPAM_TESTS,
        "mailing_lists": MAILING_LISTS,
        "/spam_tests": SITE_SPAM_TESTS,
    },
)
example(
    "rfc6609-3.4.1",
    """require ["fileinto", "include", "variables", "relational"];
global "test";
global "test_mailbox";

set "test" "$$";
include "subject_tests";

set "test" "Make money";
include "subject_tests";

if string :count "eq" "${test_mailbox}" "1"
{
    fileinto "${test_mailbox}";
    stop;
}
""",
    case("INBOX"),
    case("spam-$$", mail("Subject: a lot of $$")),
    case("spam-Make money", mail("Subject: Make money")),
    case("spam-Make money", mail("Subject: Make money: $$")),
    others={
        "subject_tests": """require ["include", "variables"];
global ["test", "test_mailbox"];

if header :contains "Subject" "${test}"
{
    set "test_mailbox" "spam-${test}";
}
"""
    },
)
example(
    "rfc6609-3.4.2",
    """require ["variables", "include", "fileinto"];
global "i_am_on_vacation";

set "global.i_am_on_vacation" "1";

if string :is "${i_am_on_vacation}" "1"
{
    fileinto "vacation";
}
""",
    case("vacation"),
)
example(
    "rfc6609-3.3-main",
    'require ["include", "fileinto"];\nreturn;\nfileinto "x";\n',
    case("INBOX"),
)
example(
    "rfc6609-3.3-included",
    'require ["include", "fileinto"];\ninclude "one";\nfileinto "x";\n',
    case("one|x"),
    others={"one": 'require ["include", "fileinto"];\nfileinto "one"; return; fileinto "two";\n'},
)
example(
    "rfc6609-3.2-stop",
    'require ["include", "fileinto"];\ninclude "one";\nfileinto "x";\n',
    case("one"),
    others={"one": 'require "fileinto";\nfileinto "one"; stop; fileinto "two";\n'},
)
example(
    "rfc6609-3.2-once",
    'require ["include", "fileinto"];\ninclude :once "one";\ninclude :once "one";\ninclude :once "active";\nkeep;\n',
    case({"INBOX": "once"}),
    others={
        "one": """require ["include", "imap4flags"];
if hasflag "once" { addflag "twice"; }
addflag "once";
include :once "one";
"""
    },
)
example(
    "rfc6609-3.2-optional",
    'require ["include"];\ninclude :optional "no"; include :optional "no"; include :global :optional "no";\nkeep;\n',
    case("INBOX"),
)
example(
    "rfc6609-3.4-private",
    """require ["include", "variables", "fileinto"];
set "x" "mine";
include "one";
if string "${x}${y}" "mine" { fileinto "mine"; }
""",
    case("theirs|mine"),
    others={
        "one": """require ["variables", "fileinto"];
if string "${x}" "" { set "x" "theirs"; }
set "y" "1";
fileinto "${x}";
"""
    },
)
example(
    "rfc6609-3.5-editheader",
    """require ["include", "editheader", "fileinto"];
addheader "X-A" "a";
deleteheader "Subject";
include "one";
if allof (exists "X-B", not exists "To") { fileinto "ok"; }
""",
    case("included|ok"),
    others={
        "one": """require ["editheader", "fileinto"];
if allof (exists "X-A", not exists "Subject") { fileinto "included"; }
addheader "X-B" "b";
deleteheader "To";
"""
    },
)

# RFC 5463: ihave.

example(
    "rfc5463-4-index",
    """require ["ihave", "editheader"];
addheader "X-Hello" "World";
if ihave "index" {
    deleteheader :index 1 "X-Hello";
    discard;
} else {
    error "Abort!";
}
""",
    case(""),
)
example(
    "rfc5463-4-unknown",
    """require ["ihave", "fileinto"];
if ihave "vnd.example.nonesuch" {
    nonesuch :with "arguments" 5K ["a", "b"] (true, false) { also "a block"; }
} elsif not ihave ["fileinto", "vnd.example.nonesuch"] {
    fileinto "else";
}
""",
    case("else"),
)
example(
    "rfc5463-4-allof",
    """require "ihave";
if allof (ihave "fileinto", ihave ["relational", "comparator-i;ascii-numeric"],
          header :value "lt" :comparator "i;ascii-numeric" "X-Priority" "3") {
    fileinto "urgent";
}
""",
    case("urgent", mail("X-Priority: 1")),
    case("INBOX", mail("X-Priority: 3")),
)
example(
    "rfc5463-4-variables",
    """require "ihave";
if ihave ["variables", "fileinto"] {
    set "x" "folder";
    fileinto "${x}";
}
""",
    case("folder"),
)

# RFC 5490: mailbox.

example(
    "rfc5490-3.1",
    """require ["fileinto", "mailbox"];
if mailboxexists "Partners" {
   fileinto "Partners";
} else {
   discard;
}
""",
    case(""),
)
example(
    "rfc5490-3.2",
    """require ["fileinto", "mailbox"];
fileinto :create "Partners";
if mailboxexists ["INBOX", "Partners"] { fileinto "wrong"; }
""",
    case("Partners"),
    case("Partners|wrong"),
)

# RFC 5703: MIME parts. replace and enclose are not offered.

EXECUTABLE = """From: x@example.org
Subject: a program
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: text/plain

Look at this.
--b
Content-Type: application/octet-stream; name=x
Content-Disposition: attachment; filename="a.COM"

MZ
--b--
"""
IMAGE = "Content-Type: image/png\nContent-Transfer-Encoding: base64\n\niVBORw0KGgo=\n"
HTML = """Subject: both
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary=b

--b
Content-Type: text/plain
Content-MD5: Q2hlY2sgSW50ZWdyaXR5IQ==

Hello
--b
Content-Type: TEXT/HTML; charset=utf-8

<p>Hello</p>
--b--
"""
IMPORTANT = """Subject: x
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain

text
--b
Content-Type: application/pdf
Content-Disposition: attachment;
 filename*0="very-im"; filename*1=portant.pdf

{}
--b--
"""
example(
    "rfc5703-4.1-type",
    """require ["mime", "fileinto"];

if header :mime :type "Content-Type" "image"
{
    fileinto "INBOX.images";
}
""",
    case("images", IMAGE),
    case("INBOX", EXECUTABLE.replace("application/octet-stream", "image/png")),
    case("INBOX", A),
)
example(
    "rfc5703-4.1-anychild",
    """require ["mime", "fileinto"];

if header :mime :anychild :contenttype
          "Content-Type" "text/html"
{
    fileinto "INBOX.html";
}
""",
    case("html", HTML),
    case("html", mail("Content-Type: text/html")),
    case("INBOX", EXECUTABLE),
)
example(
    "rfc5703-4.1-param",
    """require ["mime", "foreverypart", "fileinto"];

foreverypart
{
    if allof (
      header :mime :param "filename" :contains
         "Content-Disposition" "important",
      header :mime :subtype "Content-Type" "pdf",
      size :over 100K)
    {
        fileinto "INBOX.important";
        break;
    }
}
""",
    case("important", IMPORTANT.format("0123456789\n" * 10_000)),
    case("INBOX", IMPORTANT.format("0123456789\n")),
    case("INBOX", IMPORTANT.format("0123456789\n" * 10_000).replace("pdf\n", "png\n")),
)
example(
    "rfc5703-4.2",
    """require ["mime", "fileinto"];

if address :mime :is :all "content-from" "tim@example.com"
{
    fileinto "INBOX.part-from-tim";
}
""",
    case("part-from-tim", mail("Content-From: Tim <tim@example.com>")),
    case("INBOX", HTML.replace("Content-MD5: Q2hlY2sgSW50ZWdyaXR5IQ==", "Content-From: tim@example.com")),
)
example(
    "rfc5703-4.3",
    """require ["mime", "fileinto"];

if exists :mime :anychild "content-md5"
{
    fileinto "INBOX.md5";
}
""",
    case("md5", HTML),
    case("INBOX", EXECUTABLE),
)
example(
    "rfc5703-9.1",
    """require [ "foreverypart", "mime", "fileinto" ];
foreverypart
{
  if anyof (
         header :mime :contenttype :is
           "Content-Type" "application/exe",
         header :mime :param "filename"
           :matches ["Content-Type", "Content-Disposition"] "*.com" )
  {
    fileinto "executable";
  }
}
""",
    case("executable", EXECUTABLE),
    case("executable", EXECUTABLE.replace("a.COM", "a.bin").replace("octet-stream", "exe")),
    case("INBOX", EXECUTABLE.replace("a.COM", "a.bin")),
    case("INBOX", HTML),
)
example(
    "rfc5703-9.2",
    """require [ "foreverypart", "mime", "imap4flags" ];

foreverypart
{
  if header :mime :param "filename"
     :matches ["Content-Type", "Content-Disposition"]
       ["*.com", "*.exe", "*.vbs", "*.scr",
        "*.pif", "*.hta", "*.bat", "*.zip" ]
  {
    # these attachment types are executable
    addflag "Warning";
    break;
  }
}
""",
    case({"INBOX": "Warning"}, EXECUTABLE),
    case({"INBOX": "Warning"}, EXECUTABLE.replace("a.COM", "=?utf-8?q?=C3=BC?=.zip")),
    case({"INBOX": ""}, EXECUTABLE.replace("a.COM", "a.com.txt")),
)
example(
    "rfc5703-9.3",
    """require ["mime", "variables", "extracttext", "foreverypart", "fileinto"];

if header :contains "from" "boss@example.org"
{
  # :matches is used to get the value of the Subject header
  if header :matches "Subject" "*"
  {
    set "subject" "${1}";
  }

  # extract the first 100 characters of the first text/* part
  foreverypart
  {
    if header :mime :type :is "Content-Type" "text"
    {
      extracttext :first 100 "msgcontent";
      break;
    }
  }

  # if it's not a 'for your information' message
  if not header :contains "subject" "FYI:"
  {
    if string :is "${subject}: ${msgcontent}" "a program: Look at this."
    {
      fileinto "look";
    }
  }
}
""",
    case("INBOX", EXECUTABLE),
    case("look", EXECUTABLE.replace("x@example.org", "boss@example.org")),
    case("INBOX", EXECUTABLE.replace("x@example.org", "boss@example.org").replace("a program", "FYI: a program")),
)
example(
    "rfc5703-3-nested",
    """require ["foreverypart", "mime", "imap4flags"];
foreverypart :name "outer" {
    if header :mime :subtype "Content-Type" "alternative" {
        foreverypart :name "inner" {
            if header :mime :subtype "Content-Type" "html" {
                addflag "html";
                break :name "outer";
            }
            addflag "plain";
        }
        addflag "wrong";
    } elsif header :mime :type "Content-Type" "text" {
        foreverypart { addflag "wrong"; }
        addflag "seen";
    }
}
""",
    case({"INBOX": "html plain"}, HTML),
    case({"INBOX": "seen"}, mail("Content-Type: text/plain")),
)

# RFC 5293: editheader.

example(
    "rfc5293-4",
    """require ["editheader", "fileinto", "copy"];
/* Don't redirect if we already redirected */
if not header :contains "X-Sieve-Filtered"
        ["<kim@job.example.com>", "<kim@home.example.com>"]
{
        addheader "X-Sieve-Filtered" "<kim@job.example.com>";
        fileinto :copy "home";
}
""",
    case("home|INBOX"),
    case("INBOX", mail("X-Sieve-Filtered: <kim@home.example.com>")),
)
example(
    "rfc5293-7-test",
    """require ["editheader", "fileinto"];
addheader "X-Hello" "World";
if header :contains "X-Hello" "World"
{
        fileinto "international";
}
""",
    case("international"),
)
example(
    "rfc5293-7-unique",
    """require "editheader";
keep;
addheader "X-Flavor" "vanilla";
keep;
""",
    case("INBOX"),
)

# RFC 5235: spamtest and virustest.

SPAM = {
    "sieve_spamtest_status_header": "X-Spam-Score",
    "sieve_spamtest_status_type": "score",
    "sieve_spamtest_max_value": "10",
}
VIRUS = {
    "sieve_virustest_status_header": "X-Virus",
    "sieve_virustest_status_type": "text",
    "sieve_virustest_text_value1": "clean",
    "sieve_virustest_text_value4": "suspect",
    "sieve_virustest_text_value5": "infected",
}
example(
    "rfc5235-3.2.1",
    """require ["spamtest", "fileinto", "relational", "comparator-i;ascii-numeric"];

if spamtest :value "eq" :comparator "i;ascii-numeric" "0"
{
    fileinto "INBOX.unclassified";
}
elsif spamtest :value "ge" :comparator "i;ascii-numeric" "3"
{
    fileinto "INBOX.spam-trap";
}
""",
    case("unclassified"),
    case("unclassified", mail("X-Spam-Score: none")),
    case("INBOX", mail("X-Spam-Score: 0")),
    case("INBOX", mail("X-Spam-Score: -5.2")),
    case("spam-trap", mail("X-Spam-Score: 5.0")),
    case("spam-trap", mail("X-Spam-Score: 23")),
    options=SPAM,
)
PERCENT = """require ["spamtestplus", "fileinto", "relational",
         "comparator-i;ascii-numeric"];

if spamtest {}
            :comparator "i;ascii-numeric" "0"
{{
    fileinto "INBOX.unclassified";
}}
elsif spamtest :percent :value "eq"
               :comparator "i;ascii-numeric" "0"
{{
    fileinto "INBOX.not-spam";
}}
elsif spamtest :percent :value "lt"
               :comparator "i;ascii-numeric" "37"
{{
    fileinto "INBOX.spam-trap";
}}
else
{{
    discard;
}}
"""
for name, tags in (("value", ':value "eq"'), ("count", ':percent :count "eq"')):
    example(
        f"rfc5235-3.2.2-{name}",
        PERCENT.format(tags),
        case("unclassified"),
        case("not-spam", mail("X-Spam-Score: 0")),
        case("spam-trap", mail("X-Spam-Score: 2.0")),
        case("", mail("X-Spam-Score: 5.0")),
        case("", mail("X-Spam-Score: 11")),
        options=SPAM,
    )
example(
    "rfc5235-3.3",
    """require ["virustest", "fileinto", "relational", "comparator-i;ascii-numeric"];

if virustest :value "eq" :comparator "i;ascii-numeric" "0"
{
    fileinto "INBOX.unclassified";
}
if virustest :value "eq" :comparator "i;ascii-numeric" "4"
{
    fileinto "INBOX.quarantine";
}
elsif virustest :value "eq" :comparator "i;ascii-numeric" "5"
{
    discard;
}
""",
    case("unclassified"),
    case("INBOX", mail("X-Virus: clean")),
    case("quarantine", mail("X-Virus: suspect")),
    case("", mail("X-Virus: infected")),
    options=VIRUS,
)

# draft-ietf-sieve-regex.

example(
    "regex-7.1",
    """require ["fileinto", "regex", "variables"];

if header :regex "List-ID" "<(.*)@" {
    fileinto "lists.${1}"; stop;
}

# Imagine the header
# Subject: [acme-users] [fwd] version 1.0 is out
if header :regex "Subject" "^\\\\[(.*)\\\\] (.*)$" {
    # ${1} will hold "acme-users] [fwd"
    fileinto "${1}: ${2}";
    stop;
}
""",
    case("lists/sieve", mail("List-ID: The list <sieve@ietf.org>")),
    case("acme-users] [fwd: it is out", mail("Subject: [acme-users] [fwd] it is out")),
    case("INBOX", mail("Subject: acme-users] [fwd] it is out")),
)
example(
    "regex-8",
    """require "regex";

# Try to catch unsolicited email.
if anyof (
  # if a message is not to me (with optional +detail),
  not address :regex ["to", "cc", "bcc"]
    "me(\\\\+.*)?@company\\\\.com",

  # or the subject is all uppercase (no lowercase)
  header :regex :comparator "i;octet" "subject"
    "^[^[:lower:]]+$" ) {

  discard;    # junk it
}
""",
    case("INBOX", mail("To: me@company.com", "Subject: Hello")),
    case("INBOX", mail("Cc: Me <ME+x@Company.COM>", "Subject: Hello")),
    case("", mail("To: me@companyxcom", "Subject: Hello")),
    case("", mail("To: me@company.com", "Subject: HELLO 1")),
)

RUNS = [
    pytest.param(each, one, id=f"{each.place}-{number}")
    for each in EXAMPLES
    for number, one in enumerate(each.cases, 1)
    if each.place != "rfc5490-3.2"
]


@pytest.mark.parametrize(("each", "one"), RUNS)
def test_example(site: Site, each: Example, one: Case) -> None:
    sieve = sieve_of(site, **each.options)
    for name, script in each.others.items():
        if name.startswith("/"):
            sieve.write_global(name[1:], script)
        else:
            sieve.write(name, script)
    outcome = sieve.run(each.script, one.message, one.sender, one.detail)
    verify(outcome, one.wanted)


# Tests that are true or false for a message.

FOUR = "Subject: example\nTo: foo@example.com, baz@example.com\nCc: qux@example.com\n\nA body.\n"
COUNTED = f"Received: from a\nReceived: from b\n{FOUR}"
CAFFEINE = mail("X-Caffeine: C8H10N4O2")
NUMERIC = "relational comparator-i;ascii-numeric"
NUMBERS = f"variables {NUMERIC}"
UNICODE = "variables comparator-i;unicode-casemap"
NESTED = """From: Whomever
To: Someone
Date: Whenever
Subject: whatever
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=outer

This is a multi-part message in MIME format.

--outer
Content-Type: multipart/alternative; boundary=inner

This is a nested multi-part message in MIME format.

--inner
Content-Type: text/plain; charset="us-ascii"

Hello

--inner
Content-Type: text/html; charset="us-ascii"

<html><body>Hello</body></html>

--inner--

This is the end of the inner MIME multipart.

--outer
Content-Type: message/rfc822

From: Someone Else
Subject: hello request

Please say Hello

--outer--

This is the end of the outer MIME multipart.
"""
MY_VAR = 'set "MyVar" "NonJunk Junk gnus-forward $Forwarded NotJunk JunkRecorded $Junk $NotJunk";'
WHEN = mail("Date: Tue, 1 Apr 1997 09:06:31 -0800")

TESTS: list[tuple[str, str, str, str, bool]] = [
    ("rfc5228-2.4.2.1", "", 'exists "To"', A, True),
    ("rfc5228-2.4.2.1", "", 'exists ["To"]', A, True),
    ("rfc5228-2.4.2.2", "", 'header :contains "From:" ""', A, False),
    ("rfc5228-2.4.2.2", "", 'exists "To:"', A, False),
    ("rfc5228-2.4.2.2", "", 'header :is "From" "x@example.org"', "From   : x@example.org\n\nx\n", True),
    ("rfc5228-2.4.2.2", "", 'header :is "Subject" "a b"', "Subject: a\n b\n\nx\n", True),
    ("rfc5228-2.7.1", "", 'header :contains "Subject" "frob"', mail("Subject: frobnitzm"), True),
    ("rfc5228-2.7.1", "", 'header :contains "Subject" "nit"', mail("Subject: frobnitzm"), True),
    ("rfc5228-2.7.1", "", 'header :contains "Subject" "fbm"', mail("Subject: frobnitzm"), False),
    ("rfc5228-2.7.1", "", 'header :contains "Subject" ""', mail("Subject: frobnitzm"), True),
    ("rfc5228-2.7.1", "", 'header :is "Subject" "frobnitzm"', mail("Subject: frobnitzm"), True),
    ("rfc5228-2.7.1", "", 'header "Subject" "frobnitz"', mail("Subject: frobnitzm"), False),
    ("rfc5228-2.7.1", "", 'header :is "Subject" ""', mail("Subject: frobnitzm"), False),
    ("rfc5228-2.7.1", "", 'header :is "Subject" ""', mail("Subject:"), True),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "f?ob*m"', mail("Subject: frobnitzm"), True),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "frob"', mail("Subject: frobnitzm"), False),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "*\\\\?"', mail("Subject: really?"), True),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "*\\\\?"', mail("Subject: really"), False),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "a\\\\*"', mail("Subject: a*"), True),
    ("rfc5228-2.7.1", "", 'header :matches "Subject" "a\\\\*"', mail("Subject: ab"), False),
    ("rfc5228-2.7.1-octets", "", 'header :matches "Subject" "?"', mail("Subject: \u00e9"), False),
    ("rfc5228-2.7.1-octets", "", 'header :matches "Subject" "??"', mail("Subject: \u00e9"), True),
    ("rfc5228-2.7.2", "", 'header :is "Subject" "gr\u00fcn"', mail("Subject: =?iso-8859-1?q?gr=FCn?="), True),
    ("rfc5228-2.7.2", "", 'header :is "Subject" "ab"', mail("Subject: =?utf-8?b?YQ==?= =?utf-8?b?Yg==?="), True),
    ("rfc5228-2.7.4", "", 'address :localpart "To" "roadrunner"', A, True),
    ("rfc5228-2.7.4", "", 'address :domain "To" "ACME.example.com"', A, True),
    ("rfc5228-2.7.4", "", 'address "To" "roadrunner@acme.example.com"', A, True),
    ("rfc5228-2.7.4", "", 'address :localpart "To" "acme.example.com"', A, False),
    ("rfc5228-5.2", "", "allof (false, false)", A, False),
    ("rfc5228-5.2", "", "allof (false, true)", A, False),
    ("rfc5228-5.2", "", "allof (true,  true)", A, True),
    ("rfc5228-5.3", "", "anyof (false, false)", A, False),
    ("rfc5228-5.3", "", "anyof (false, true)", A, True),
    ("rfc5228-5.3", "", "anyof (true,  true)", A, True),
    ("rfc5228-5.6", "", "false", A, False),
    ("rfc5228-5.7", "", 'header :is ["X-Caffeine"] [""]', CAFFEINE, False),
    ("rfc5228-5.7", "", 'header :contains ["X-Caffeine"] [""]', CAFFEINE, True),
    ("rfc5228-5.7", "", 'header :contains ["X-Caffeine"] [""]', A, False),
    ("rfc5228-5.7", "", 'not header :matches "Cc" "?*"', A, True),
    ("rfc5228-5.7", "", 'not header :matches "Cc" "?*"', mail("Cc:  \t "), True),
    ("rfc5228-5.7", "", 'not header :matches "Cc" "?*"', mail("Cc: x@example.org"), False),
    ("rfc5228-5.8", "", "not false", A, True),
    ("rfc5228-5.8", "", "not true", A, False),
    ("rfc5228-5.10", "", "true", A, True),
    ("rfc5231-6", NUMERIC, 'address :count "ge" :comparator "i;ascii-numeric" ["to", "cc"] ["3"]', COUNTED, True),
    (
        *("rfc5231-6", NUMERIC),
        ('anyof ( address :count "ge" :comparator "i;ascii-numeric" ["to"] ["3"],'
        ' address :count "ge" :comparator "i;ascii-numeric" ["cc"] ["3"] )'),
        *(COUNTED, False),
    ),
    ("rfc5231-6", NUMERIC, 'header :count "ge" :comparator "i;ascii-numeric" ["received"] ["3"]', COUNTED, False),
    (
        *("rfc5231-6", NUMERIC),
        'header :count "ge" :comparator "i;ascii-numeric" ["received", "subject"] ["3"]',
        *(COUNTED, True),
    ),
    ("rfc5231-6", NUMERIC, 'header :count "ge" :comparator "i;ascii-numeric" ["to", "cc"] ["3"]', COUNTED, False),
    ("rfc5231-4.2", f"{NUMERIC} envelope", 'envelope :count "eq" "from" "1"', A, True),
    ("rfc5231-4.2", f"{NUMERIC} envelope", 'envelope :count "eq" ["from", "to"] "2"', A, True),
    ("rfc5231-4.2", NUMERIC, 'header :count "eq" "x-none" "0"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :value "lt" :comparator "i;ascii-numeric" "2" "10"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :is :comparator "i;ascii-numeric" "007" "7"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :is :comparator "i;ascii-numeric" "10 pages" "10"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :is :comparator "i;ascii-numeric" "ten" "eleven"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :value "gt" :comparator "i;ascii-numeric" "-1" "4294967295"', A, True),
    ("rfc4790-9.1", NUMBERS, 'string :value "gt" :comparator "i;ascii-numeric" "4294967296" "4294967295"', A, True),
    ("rfc4790-9.2", "variables relational", 'string :value "eq" "aBc" "AbC"', A, True),
    ("rfc4790-9.2", "variables relational", 'string :value "gt" "_" "a"', A, True),
    ("rfc4790-9.2", "variables", 'string "\u00c9" "\u00e9"', A, False),
    ("rfc4790-9.3", "variables", 'string :comparator "i;octet" "a" "A"', A, False),
    ("rfc4790-9.3", "variables relational", 'string :value "lt" :comparator "i;octet" "B" "a"', A, True),
    ("rfc4790-9.3", "variables relational", 'string :value "lt" :comparator "i;octet" "a" "ab"', A, True),
    ("rfc5051", UNICODE, 'string :comparator "i;unicode-casemap" "\u00c9T\u00c9" "\u00e9t\u00e9"', A, True),
    ("rfc5051", UNICODE, 'string :comparator "i;unicode-casemap" "\u00e9" "e\u0301"', A, True),
    ("rfc5051", UNICODE, 'string :comparator "i;unicode-casemap" "\u00e9" "e"', A, False),
    ("rfc5051", UNICODE, 'string :contains :comparator "i;unicode-casemap" "l\'\u00c9T\u00c9" "\u00e9t"', A, True),
    ("rfc5051", UNICODE, 'string :matches :comparator "i;unicode-casemap" "\u0416\u0436" "\u0436?"', A, True),
    ("rfc5051", "comparator-i;unicode-casemap", 'header :is :comparator "i;unicode-casemap" "Subject" "\u00dc"',
     mail("Subject: =?utf-8?q?=C3=BC?="), True),
    ("rfc5233-4-none", "subaddress", 'address :detail :contains "To" ""', mail("To: ken@example.org"), False),
    ("rfc5233-4-empty", "subaddress", 'address :detail :is "To" ""', mail("To: ken+@example.org"), True),
    ("rfc5233-4-detail", "subaddress", 'address :detail "To" "sieve"', mail("To: ken+sieve@example.org"), True),
    ("rfc5233-4-user", "subaddress", 'address :user "To" "ken"', mail("To: ken+sieve@example.org"), True),
    ("rfc5233-4-user", "subaddress", 'address :user "To" "ken"', mail("To: ken@example.org"), True),
    ("rfc5173-4", "body", 'body :raw :contains ""', "Subject: x\n", False),
    ("rfc5173-4", "body", 'body :contains ""', "Subject: x\n\n", True),
    ("rfc5173-5.2", "body", 'body :content "multipart" :contains "MIME"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "multipart" :contains "end of the outer"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "multipart" :contains "nested multi-part"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "multipart" :contains "Hello"', NESTED, False),
    ("rfc5173-5.2", "body", 'body :content "text/plain" :contains "Hello"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "text/plain" :contains "please say"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "text/plain" :contains "html"', NESTED, False),
    ("rfc5173-5.2", "body", 'body :content "text/html" :contains "Hello"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "text" :contains "<html>"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "message/rfc822" :contains "Hello"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content "message/rfc822" :contains "please"', NESTED, False),
    ("rfc5173-5.2", "body", 'body :content "" :contains "please"', NESTED, True),
    ("rfc5173-5.2", "body", 'body :content ["/plain", "text/", "text/plain/x", "/"] :contains ""', NESTED, False),
    ("rfc5173-5.2", "body", 'body :content "text/plain" :matches "*hello*please*"', NESTED, False),
    (
        *("rfc5173-5.2-charset", "body", 'body :content "text" :contains "gr\u00fcn"'),
        *(mail("Content-Type: text/plain; charset=iso-8859-1", "Content-Transfer-Encoding: base64",
               body="Z3L8bg==\n"), True),
    ),
    ("rfc5260-4.2-year", "date", 'date :originalzone "date" "year" "1997"', WHEN, True),
    ("rfc5260-4.2-month", "date", 'date :originalzone "date" "month" "04"', WHEN, True),
    ("rfc5260-4.2-day", "date", 'date :originalzone "date" "day" "01"', WHEN, True),
    ("rfc5260-4.2-date", "date", 'date :originalzone "date" "DATE" "1997-04-01"', WHEN, True),
    ("rfc5260-4.2-julian", "date", 'date :originalzone "date" "julian" "50539"', WHEN, True),
    ("rfc5260-4.2-hour", "date", 'date :originalzone "date" "hour" "09"', WHEN, True),
    ("rfc5260-4.2-minute", "date", 'date :originalzone "date" "minute" "06"', WHEN, True),
    ("rfc5260-4.2-second", "date", 'date :originalzone "date" "second" "31"', WHEN, True),
    ("rfc5260-4.2-time", "date", 'date :originalzone "date" "time" "09:06:31"', WHEN, True),
    ("rfc5260-4.2-iso8601", "date", 'date :originalzone "date" "iso8601" "1997-04-01T09:06:31-08:00"', WHEN, True),
    ("rfc5260-4.2-iso8601", "date", 'date :zone "+0000" "date" "iso8601" "1997-04-01T17:06:31Z"', WHEN, True),
    ("rfc5260-4.2-std11", "date", 'date :originalzone :matches "date" "std11" "Tue, *1 Apr 1997 09:06:31 -0800"',
     WHEN, True),
    ("rfc5260-4.2-zone", "date", 'date :originalzone "date" "zone" "-0800"', WHEN, True),
    ("rfc5260-4.2-zone", "date", 'date :zone "-0000" "date" "zone" "+0000"', WHEN, True),
    ("rfc5260-4.2-zone", "date", 'date :zone "+0530" "date" "zone" "+0530"', WHEN, True),
    ("rfc5260-4.2-weekday", "date", 'date :originalzone "date" "weekday" "2"', WHEN, True),
    ("rfc5260-4.1-zone", "date", 'date :zone "+1400" "date" "day" "02"', WHEN, True),
    ("rfc5260-4-none", "date", 'date :contains "resent-date" "year" ""', WHEN, False),
    ("rfc5260-4-invalid", "date", 'date :contains "date" "year" ""', mail("Date: 29 Feb 1997 10:00 +0000"), False),
    ("rfc5260-4-count", f"date {NUMERIC}", 'date :count "eq" "date" "year" "1"', WHEN, True),
    ("rfc5260-4-count", f"date {NUMERIC}", 'date :count "eq" "date" "year" "0"', mail("Date: today"), True),
    ("rfc5260-5-count", f"date {NUMERIC}", 'currentdate :count "eq" "year" "1"', WHEN, True),
    ("rfc5260-6-header", "index", 'header :index 2 "X-A" "b"', mail("X-A: a", "X-A: b", "X-A: c"), True),
    ("rfc5260-6-header", "index", 'header :index 2 "X-A" "a"', mail("X-A: a", "X-A: b", "X-A: c"), False),
    ("rfc5260-6-last", "index", 'header :index 1 :last "X-A" "c"', mail("X-A: a", "X-A: b", "X-A: c"), True),
    ("rfc5260-6-last", "index", 'header :index 3 :last "X-A" "a"', mail("X-A: a", "X-A: b", "X-A: c"), True),
    ("rfc5260-6-beyond", "index", 'header :contains :index 4 "X-A" ""', mail("X-A: a", "X-A: b", "X-A: c"), False),
    ("rfc5260-6-address", "index", 'address :index 1 :domain "To" "b.example"', mail("To: a@a.example, b@b.example"),
     True),
    ("rfc5183-4", "environment", 'environment :contains "item" ""', A, False),
    ("rfc5183-4", "environment", 'environment :matches "remote-host" "*.example.com"', A, False),
    ("rfc5183-4.1-location", "environment", 'environment "location" "MDA"', A, True),
    ("rfc5183-4.1-phase", "environment", 'environment "phase" "during"', A, True),
    ("rfc5183-4.1-name", "environment", 'environment :contains "name" ""', A, True),
    ("rfc5183-4.1-version", "environment", 'environment :contains "version" ""', A, True),
    ("rfc5183-4.1-host", "environment", 'environment :matches "host" "?*"', A, True),
    ("rfc5183-4-count", f"environment {NUMERIC}", 'environment :count "eq" "name" "1"', A, True),
    ("rfc5463-4", "ihave", 'ihave ["ihave", "copy", "envelope", "comparator-i;octet"]', A, True),
    ("rfc5463-4", "ihave", 'ihave ["copy", "comparator-i;elbonia"]', A, False),
    ("rfc5463-4-octet", "ihave", 'ihave "COPY"', A, False),
    ("rfc5490-3.1", "mailbox", 'mailboxexists "INBOX"', A, True),
    ("rfc5490-3.1", "mailbox", 'mailboxexists ["INBOX", "missing"]', A, False),
    ("rfc5703-4.1-count", f"mime {NUMERIC}", 'header :mime :anychild :type :count "eq" "Content-Type" "3"', HTML, True),
    ("rfc5703-4.1-count", f"mime {NUMERIC}", ('header :mime :anychild :param ["charset", "boundary"] :count "eq" '
     '"Content-Type" "2"'), HTML, True),
    ("rfc5703-4.1-disposition", "mime", 'header :mime :anychild :type "Content-Disposition" "attachment"', EXECUTABLE,
     True),
    ("rfc5703-4.1-disposition", "mime", 'header :mime :anychild :subtype "Content-Disposition" ""', EXECUTABLE, True),
    ("rfc5703-4.1-other", "mime", 'header :mime :anychild :contenttype "Content-MD5" ""', HTML, True),
    ("regex-6", "regex", 'header :regex "Subject" "b{2,3}"', mail("Subject: abbc"), True),
    ("regex-6", "regex", 'header :regex "Subject" "^b{2,3}$"', mail("Subject: bbbb"), False),
    ("regex-6", "regex", 'header :regex "Subject" "^(a|b)+[[:digit:]]?$"', mail("Subject: abab7"), True),
    ("regex-6", "regex", 'header :regex "Subject" "a.c"', mail("Subject: xABCx"), True),
    ("regex-6", "regex", 'header :regex :comparator "i;octet" "Subject" "a.c"', mail("Subject: xABCx"), False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("requires", "test", "message", "wanted"),
    [pytest.param(*row, id=f"{place}-{number}") for number, (place, *row) in enumerate(TESTS)],
)
def test_condition(site: Site, requires: str, test: str, message: str, wanted: bool) -> None:
    assert holds(site, requires, test, message) is wanted


@pytest.mark.parametrize(
    "test",
    [
        'envelope :is "from" ""',
        'envelope :all :is "from" ""',
        'envelope :localpart :is "from" ""',
        'envelope :domain :is "FROM" ""',
        'envelope :count "eq" "from" "0"',
    ],
)
def test_rfc5228_5_4_the_null_reverse_path_is_the_empty_string(site: Site, test: str) -> None:
    assert holds(site, f"envelope {NUMERIC}", test, sender="")


# Strings.

COMPANY = 'set "company" "ACME";'
SCRAMBLED = 'set "a" "juMBlEd lETteRS";'
ENCODED, VARIABLES, EXTRACT = "encoded-character", "variables", "variables foreverypart extracttext"
VALUES: list[tuple[str, str, str, str, str]] = [
    ("rfc5228-2.4.2.4", ENCODED, "", "$${hex:40}", "$@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${hex: 40 }", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${HEX: 40}", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${hex:40", "${hex:40"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${hex:400}", "${hex:400}"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${hex:4${hex:30}}", "${hex:40}"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${unicode:40}", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${ unicode:40}", "${ unicode:40}"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${UNICODE:40}", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${UnICoDE:0000040}", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${Unicode:40}", "@"),
    ("rfc5228-2.4.2.4", ENCODED, "", "${Unicode:Cool}", "${Unicode:Cool}"),
    ("rfc5228-2.4.2.4", "", "", "${hex:40}", "${hex:40}"),
    ("rfc5228-2.4.2", "", "", '\\a\\\\b\\"c', 'a\\b"c'),
    ("rfc5229-3", VARIABLES, COMPANY, "&%${}!", "&%${}!"),
    ("rfc5229-3", VARIABLES, COMPANY, "${doh!}", "${doh!}"),
    ("rfc5229-3", VARIABLES, COMPANY, "${full}", ""),
    ("rfc5229-3", VARIABLES, COMPANY, "${company}", "ACME"),
    ("rfc5229-3", VARIABLES, COMPANY, "${BAD${Company}", "${BADACME"),
    ("rfc5229-3", VARIABLES, COMPANY, "${President, ${Company} Inc.}", "${President, ACME Inc.}"),
    ("rfc5229-3", "", "", "${company}", "${company}"),
    ("rfc5229-3.1", VARIABLES, 'set "foo" "F";', "${fo\\o}", "F"),
    ("rfc5229-3.1", VARIABLES, 'set "foo" "F";', "${fo\\\\o}", "${fo\\o}"),
    ("rfc5229-3.1", VARIABLES, 'set "foo" "F";', "\\${foo}", "F"),
    ("rfc5229-3.1", VARIABLES, 'set "foo" "F";', "\\\\${foo}", "\\F"),
    (
        *("rfc5229-3.1", VARIABLES, 'set "dollar" "$"; set "text" "regarding ${dollar}{beep}";'),
        *("${text}", "regarding ${beep}"),
    ),
    ("rfc5229-3.2", VARIABLES, 'if header :matches "Subject" "[*] *" {}', "${1}", "acme-users"),
    ("rfc5229-3.2", VARIABLES, 'if header :matches "Subject" "[*] *" {}', "${02}", "[fwd] version 1.0 is out"),
    (
        *("rfc5229-3.2", VARIABLES, 'if header :matches "Subject" "[*] *" {}'),
        *("${0}${3}", "[acme-users] [fwd] version 1.0 is out"),
    ),
    (
        *("rfc5229-3.2", VARIABLES, 'if header :matches "Subject" "*version ?.?*" { if header :matches "X" "*" {} }'),
        *("${1}|${2}|${3}|${4}", "[acme-users] [fwd] |1|0| is out"),
    ),
    (
        *("rfc5229-4", VARIABLES, ('set "honorific" "Mr"; set "first_name" "Wile"; set "last_name" "Coyote";\n'
          'set "vacation" text:\nDear ${HONORIFIC} ${last_name},\n.\n;\n'
          'if string :matches "${vacation}" "*,*" { set "x" "${1}"; }')),
        *("${x}", "Dear Mr Coyote"),
    ),
    ("rfc5229-4.1", VARIABLES, SCRAMBLED, "${a}", "juMBlEd lETteRS"),
    ("rfc5229-4.1", VARIABLES, f'{SCRAMBLED} set :length "b" "${{a}}";', "${b}", "15"),
    ("rfc5229-4.1", VARIABLES, f'{SCRAMBLED} set :lower "b" "${{a}}";', "${b}", "jumbled letters"),
    ("rfc5229-4.1", VARIABLES, f'{SCRAMBLED} set :upperfirst "b" "${{a}}";', "${b}", "JuMBlEd lETteRS"),
    ("rfc5229-4.1", VARIABLES, f'{SCRAMBLED} set :upperfirst :lower "b" "${{a}}";', "${b}", "Jumbled letters"),
    ("rfc5229-4.1", VARIABLES, f'{SCRAMBLED} set :lowerfirst :upper "b" "${{a}}";', "${b}", "jUMBLED LETTERS"),
    ("rfc5229-4.1", VARIABLES, 'set :quotewildcard "b" "Rock*";', "${b}", "Rock\\*"),
    ("rfc5229-4.1", VARIABLES, 'set :length :quotewildcard "b" "Rock*?\\\\";', "${b}", "10"),
    ("rfc5229-4.1.1", VARIABLES, 'set :length "b" "\u00e9\u00e9";', "${b}", "2"),
    ("rfc5229-4.1.3", VARIABLES, 'set :lower "b" "A\u00c9B"; set :length "c" "${b}";', "${c}", "3"),
    (
        *("rfc5229-4.1.3", VARIABLES, ('set :lower "b" "A\u00c9B"; if string :comparator "i;octet" "${b}" "a\u00c9b" '
          '{ set "c" "ok"; }')),
        *("${c}", "ok"),
    ),
    (
        *("rfc5229-6", f"{VARIABLES} {NUMERIC}"),
        *('if string :count "eq" ["", "a", "${none}", "b"] "2" { set "c" "2"; }',),
        *("${c}", "2"),
    ),
    (
        *("rfc5173-6", f"{VARIABLES} body", 'if header :matches "Subject" "*" {} if body :matches "*" {}'),
        *("${1}", "[acme-users] [fwd] version 1.0 is out"),
    ),
    ("regex-7.1", f"{VARIABLES} regex", 'if header :regex "Subject" "^(\\\\[[^]]*\\\\]) (.*)$" {}', "${1}|${2}",
     "[acme-users]|[fwd] version 1.0 is out"),
    ("regex-7.1", f"{VARIABLES} regex", 'if header :regex "Subject" "v(er|ersion) ?(x)?1" {}', "${0}|${1}|${2}",
     "version 1|ersion|"),
    ("regex-7.2", f"{VARIABLES} regex", 'set :quoteregex "b" "a.b*[c]";', "${b}", "a\\.b\\*\\[c\\]"),
    ("rfc5703-7", EXTRACT, 'foreverypart { extracttext :first 4 "x"; }', "${x}", "Gr\u00fc\u00df"),
    ("rfc5703-7", EXTRACT, ('foreverypart { extracttext :upper "x"; break; }'
     'if string :matches "${x}" "GR*E*" { set "y" "ok"; }'), "${y}", "ok"),
]  # fmt: skip
FORWARDED = """Subject: [acme-users] [fwd] version 1.0 is out
MIME-Version: 1.0
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Gr=FC=DFe
"""


@pytest.mark.parametrize(
    ("requires", "commands", "value", "wanted"),
    [pytest.param(*row, id=f"{place}-{number}") for number, (place, *row) in enumerate(VALUES)],
)
def test_value(site: Site, requires: str, commands: str, value: str, wanted: str) -> None:
    assert value_of(site, requires, commands, value, FORWARDED) == wanted


@pytest.mark.parametrize("value", ["${unicode:200000}", "${Unicode:DF01}", "${unicode:40 d800}"])
def test_rfc5228_2_4_2_4_a_character_that_does_not_exist_is_an_error(site: Site, value: str) -> None:
    outcome = sieve_of(site).run(script_text("encoded-character fileinto", f'\nfileinto "x{value}";'))
    assert list(outcome.folders) == ["INBOX"]
    assert len(outcome.errors) == 1


FLAG_TESTS = [
    ('addflag "A B";', 'hasflag :is "b A"', True),
    ('addflag "A B";', 'hasflag ["b","A"]', True),
    ('addflag "A B";', 'hasflag ["c"]', False),
    (MY_VAR, 'hasflag :contains "MyVar" "Junk"', True),
    (MY_VAR, 'hasflag :contains "MyVar" "forward"', True),
    (MY_VAR, 'hasflag :contains "MyVar" ["label", "forward"]', True),
    (MY_VAR, 'hasflag :contains "MyVar" ["junk", "forward"]', True),
    (MY_VAR, 'hasflag :contains "MyVar" "junk forward"', True),
    (MY_VAR, 'hasflag :contains "MyVar" "forward junk"', True),
    (MY_VAR, 'hasflag :contains "MyVar" "label"', False),
    (MY_VAR, 'hasflag :contains "MyVar" ["label1", "label2"]', False),
    ('addflag "MyFlags" "A B";', 'hasflag :count "ge" :comparator "i;ascii-numeric" "MyFlags" "2"', True),
    ('addflag "MyFlags" "A B a";', 'hasflag :count "ge" :comparator "i;ascii-numeric" "MyFlags" "3"', False),
]


@pytest.mark.parametrize(("commands", "test", "wanted"), FLAG_TESTS)
def test_rfc5232_4_hasflag(site: Site, commands: str, test: str, wanted: bool) -> None:
    script = script_text(
        f"imap4flags fileinto {NUMBERS}",
        f'{commands}\nif {test} {{ fileinto :flags "" "yes"; }} else {{ fileinto :flags "" "no"; }}',
    )
    verify(sieve_of(site).run(script), "yes" if wanted else "no")


# What takes more than one message, or depends on the time.


def test_rfc5490_3_1_a_folder_that_exists(site: Site) -> None:
    sieve = sieve_of(site)
    sieve.add_folder("Partners")
    [partners] = [each for each in EXAMPLES if each.place == "rfc5490-3.1"]
    verify(sieve.run(partners.script), "Partners")


def test_rfc5490_3_2_create(site: Site) -> None:
    """Actions are done at the end, or at once: the test may see the folder that the same run makes."""
    script = 'require ["fileinto", "mailbox"];\nfileinto :create "Partners";\n'
    sieve = sieve_of(site)
    for _ in range(2):
        verify(sieve.run(script), "Partners")
    verify(sieve.run('require ["fileinto", "mailbox"];\nif mailboxexists ["INBOX", "Partners"] { discard; }'), "")


@pytest.mark.parametrize(
    "tags", [r':specialuse "\\Junk"', r':specialuse "\\junk" :create', r':create :specialuse "\\Junk"']
)
@pytest.mark.parametrize("folder", ["Junk", ""])
def test_rfc8579_4_a_folder_of_special_use(site: Site, tags: str, folder: str) -> None:
    """Where no folder has the use, the message goes into the one that is named."""
    sieve = sieve_of(site, **{"xlist-junk": "Junk"})
    if folder:
        sieve.add_folder(folder)
    script = f'require ["fileinto", "special-use", "mailbox"];\nfileinto {tags} "Spam";\n'
    verify(sieve.run(script), folder or "Spam")


@pytest.mark.parametrize(
    ("test", "wanted"),
    [
        (r'specialuse_exists "\\Junk"', True),
        (r'specialuse_exists ["\\junk", "\\Archive"]', True),
        (r'specialuse_exists ["\\Junk", "\\Sent"]', False),
        (r'specialuse_exists "Junk" "\\Junk"', True),
        (r'specialuse_exists "Archive" "\\Junk"', False),
        (r'specialuse_exists "missing" "\\Junk"', False),
    ],
)
def test_rfc8579_3_specialuse_exists(site: Site, test: str, wanted: bool) -> None:
    sieve = sieve_of(site, **{"xlist-junk": "Junk", "xlist-archive": "Archive", "xlist-sent": "Sent"})
    sieve.add_folder("Junk")
    sieve.add_folder("Archive")
    script = f'require ["fileinto", "special-use"];\nif {test} {{ fileinto "yes"; }} else {{ fileinto "no"; }}\n'
    verify(sieve.run(script), "yes" if wanted else "no")


def test_rfc5260_5_1_business_hours(site: Site) -> None:
    script = """require ["date", "relational", "fileinto"];
if anyof(currentdate :is "weekday" "0",
         currentdate :is "weekday" "6",
         currentdate :value "lt" "hour" "09",
         currentdate :value "ge" "hour" "17")
{ fileinto "pager"; }
"""
    before = time.localtime()
    outcome = sieve_of(site).run(script)
    wanted = [now.tm_wday >= 5 or not 9 <= now.tm_hour < 17 for now in (before, time.localtime())]
    assert list(outcome.placed) in (["pager" if away else "INBOX"] for away in wanted)


def test_rfc5260_5_1_a_folder_for_the_month(site: Site) -> None:
    script = """require ["date", "variables", "fileinto"];
if currentdate :matches "month" "*" { set "month" "${1}"; }
if currentdate :matches "year"  "*" { set "year"  "${1}"; }
fileinto "${month}-${year}";
"""
    before = time.localtime()
    outcome = sieve_of(site).run(script)
    assert list(outcome.placed) in ([time.strftime("%m-%Y", now)] for now in (before, time.localtime()))


def test_rfc5260_5_1_a_header_field_with_the_time(site: Site) -> None:
    script = """require ["variables", "date", "editheader"];
if currentdate :matches "std11" "*"
  {addheader "Processing-date" "${0}";}
"""
    date = sieve_of(site).run(script).message.header("Processing-date")
    assert date
    assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 100


@pytest.mark.parametrize(("zone", "hour"), [("Etc/GMT-3", "20"), ("Etc/GMT+5", "12"), ("UTC", "17")])
def test_rfc5260_4_1_without_a_zone_it_is_that_of_the_host(
    site: Site, monkeypatch: pytest.MonkeyPatch, zone: str, hour: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        assert holds(site, "date", f'date "date" "hour" "{hour}"', WHEN)
    time.tzset()


def identified(name: str, *fields: str) -> str:
    return mail(f"Message-ID: <{name}@example.org>", "Date: Tue, 1 Apr 1997 09:06:31 -0800", *fields)


DUPLICATES = {
    "bare": 'require "duplicate";\nif duplicate {\n  discard;\n}\n',
    "header": 'require "duplicate";\nif duplicate :header "message-id" {\n  discard;\n}\n',
    "uniqueid": """require ["duplicate", "variables"];
if header :matches "message-id" "*" {
  if duplicate :uniqueid "${0}" {
    discard;
  }
}
""",
}


@pytest.mark.parametrize("first", DUPLICATES)
@pytest.mark.parametrize("second", DUPLICATES)
def test_rfc7352_3_2_the_source_of_an_id_does_not_matter(site: Site, first: str, second: str) -> None:
    sieve = sieve_of(site)
    verify(sieve.run(DUPLICATES[first], identified("a")), "INBOX")
    verify(sieve.run(DUPLICATES[second], identified("a")), "")
    verify(sieve.run(DUPLICATES[second], identified("A")), "INBOX")


def test_rfc7352_5_1(site: Site) -> None:
    script = """require ["duplicate", "fileinto", "mailbox"];

if duplicate {
  fileinto :create "Trash/Duplicate";
}
"""
    sieve = sieve_of(site, unixhierarchysep="yes")
    verify(sieve.run(script, identified("a")), "INBOX")
    verify(sieve.run(script, identified("b")), "INBOX")
    verify(sieve.run(script, identified("a")), "Trash/Duplicate")


def test_rfc7352_5_2(site: Site) -> None:
    script = """require ["duplicate", "variables", "imap4flags",
  "fileinto"];

if header :matches "subject" "ALERT: *" {
  if duplicate :seconds 60 :uniqueid "${1}" {
    setflag "\\\\seen";
  }
  fileinto "Alerts";
}
"""
    sieve = sieve_of(site)
    verify(sieve.run(script, identified("a", "Subject: ALERT: disk full")), {"Alerts": ""})
    verify(sieve.run(script, identified("b", "Subject: ALERT: disk full")), {"Alerts": r"\Seen"})
    verify(sieve.run(script, identified("c", "Subject: ALERT: disk broken")), {"Alerts": ""})
    verify(sieve.run(script, identified("c", "Subject: disk full")), {"INBOX": ""})


def test_rfc7352_5_3(site: Site) -> None:
    script = """require ["variables", "envelope", "fileinto", "duplicate"];

if envelope :matches "from" "*" { set "sender" "${1}"; }
if header :matches "subject" "*" { set "subject" "${1}"; }

# account for 'Re:' prefix
if string :comparator "i;ascii-casemap"
  :matches "${subject}" "Re:*"
{
  set "subject" "${1}";
}
if not duplicate :seconds 1800
  :uniqueid "${sender} ${subject}"
{
  fileinto "notify";
}
"""
    sieve = sieve_of(site)
    for sender, subject, wanted in (
        ("a@example.org", "Re: it", "notify"),
        ("a@example.org", "RE: it", "INBOX"),
        ("b@example.org", "Re: it", "notify"),
        ("a@example.org", "Re: that", "notify"),
        ("a@example.org", "Re: that", "INBOX"),
    ):
        verify(sieve.run(script, mail(f"Subject: {subject}"), sender), wanted)


def test_rfc7352_5_4(site: Site) -> None:
    script = """require ["duplicate", "imap4flags"];

if duplicate :header "X-Event-ID" :handle "notifier" {
  discard;
}
if allof (
  duplicate :header "X-Ticket-ID" :handle "support",
  address "to" "support@example.com",
  header :contains "subject" "fileserver")
{
  setflag "\\\\seen";
}
"""
    sieve = sieve_of(site)
    ticket = mail("X-Ticket-ID: 1", "To: support@example.com", "Subject: the fileserver")
    verify(sieve.run(script, ticket), {"INBOX": ""})
    verify(sieve.run(script, mail("X-Event-ID: 1")), {"INBOX": ""})
    verify(sieve.run(script, mail("X-Event-ID: 1")), "")
    verify(sieve.run(script, ticket), {"INBOX": r"\Seen"})
    verify(sieve.run(script, ticket.replace("fileserver", "printer")), {"INBOX": ""})


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (':header "X-Missing"', identified("a")),
        (':header "not a name"', identified("a")),
        (":seconds 0", identified("a")),
        ("", mail("Subject: no Message-ID")),
    ],
)
def test_rfc7352_3_what_is_never_a_duplicate(site: Site, tags: str, message: str) -> None:
    sieve = sieve_of(site)
    for _ in range(3):
        verify(sieve.run(f'require "duplicate";\nif duplicate {tags} {{ discard; }}\n', message), "INBOX")


def test_rfc7352_3_the_same_test_twice_gives_the_same(site: Site) -> None:
    script = 'require ["duplicate", "fileinto"];\nif duplicate { discard; }\nif duplicate { fileinto "again"; }\n'
    sieve = sieve_of(site)
    verify(sieve.run(script, identified("a")), "INBOX")
    verify(sieve.run(script, identified("a")), "again")


def test_rfc7352_3_a_run_that_fails_remembers_nothing(site: Site) -> None:
    sieve = sieve_of(site)
    failing = 'require ["duplicate", "ihave"];\nif duplicate { discard; } else { error "no"; }\n'
    for _ in range(2):
        outcome = sieve.run(failing, identified("a"))
        assert list(outcome.folders) == ["INBOX"]
        assert len(outcome.errors) == 1
    verify(sieve.run(DUPLICATES["bare"], identified("a")), "INBOX")


def test_rfc5463_5_error(site: Site) -> None:
    """The message is in the INBOX only, and the log has the text."""
    script = 'require ["ihave", "fileinto"];\nfileinto "x";\n\nerror "Neither this nor that is there";\n'
    outcome = sieve_of(site).run(script)
    assert outcome.placed == {"INBOX": ""}
    [error] = outcome.errors
    assert error.startswith("4: ")
    assert "Neither this nor that is there" in error


def test_rfc5463_4_what_ihave_has_enabled_is_checked(site: Site) -> None:
    """A fault of the script is not hidden, be it found early or late."""
    outcome = sieve_of(site).run('require "ihave";\nif ihave "fileinto" {\n  fileinto 5;\n}\n')
    assert outcome.placed == {"INBOX": ""}
    assert len(outcome.errors) == 1


@pytest.mark.parametrize(
    ("include", "script"),
    [
        ('"missing"', ""),
        (':global "missing"', ""),
        ('"active"', ""),
        ('"one"', 'require "include";\ninclude "two";\n'),
        ('"one"', 'require "fileinto";\nfileinto "one";\nnonesuch;\n'),
        ('"one"', 'fileinto "not required here";\n'),
    ],
)
def test_rfc6609_3_errors(site: Site, include: str, script: str) -> None:
    """A script that is missing, includes itself, or is wrong."""
    others = {"one": script, "two": 'require "include";\ninclude "one";\n'} if script else {}
    outcome = sieve_of(site).run(f'require ["include", "fileinto"];\nfileinto "x";\ninclude {include};\n', **others)
    assert outcome.placed == {"INBOX": ""}
    assert len(outcome.errors) == 1


EDITS = [
    ("rfc5293-4-first", 'addheader "X-Hello" "new";', ["new", "1", "2", "3", "4"]),
    ("rfc5293-4-last", 'addheader :last "X-Hello" "new";', ["1", "2", "3", "4", "new"]),
    ("rfc5293-5-all", 'deleteheader "x-hello";', []),
    ("rfc5293-5-value", 'deleteheader :contains "X-Hello" ["2", "4"];', ["1", "3"]),
    ("rfc5293-5-index", 'deleteheader :index 1 :contains "X-Hello" "1";', ["2", "3", "4"]),
    ("rfc5293-5-index-other", 'deleteheader :index 1 :contains "X-Hello" "2";', ["1", "2", "3", "4"]),
    ("rfc5293-5-last", 'deleteheader :index 2 :last "X-Hello";', ["1", "2", "4"]),
    ("rfc5293-5-beyond", 'deleteheader :index 9 "X-Hello";', ["1", "2", "3", "4"]),
    ("rfc5293-7-same", 'addheader "X-Hello" "World"; deleteheader :index 1 "X-Hello";', ["1", "2", "3", "4"]),
    ("rfc5293-7-third", 'deleteheader :index 1 "X-Hello"; deleteheader :index 2 "X-Hello";', ["2", "4"]),
    ("rfc5293-6-received", 'deleteheader "Received"; deleteheader "Auto-Submitted";', ["1", "2", "3", "4"]),
]  # fmt: skip


@pytest.mark.parametrize(("commands", "wanted"), [pytest.param(*row, id=place) for place, *row in EDITS])
def test_rfc5293_edited_header(site: Site, commands: str, wanted: list[str]) -> None:
    fields = ["Received: from a by b; Tue, 1 Apr 1997 09:06:31 -0800", "Auto-Submitted: no", "Subject: x"]
    message = mail(*fields, "X-Hello: 1", "X-Hello: 2", "x-hello:\n 3", "X-Hello:   4  ")
    outcome = sieve_of(site).run(script_text("editheader index", commands), message)
    verify(outcome, "INBOX")
    stored = outcome.message
    assert stored.headers("X-Hello") == wanted
    assert [stored.header(name) for name in ("Subject", "Auto-Submitted")] == ["x", "no"]
    assert len(stored.headers("Received")) == 1
    assert stored.octets.endswith(b"\n\nA body.\n")


def test_rfc5293_6_the_subject_can_be_changed(site: Site) -> None:
    script = """require ["editheader", "variables"];
if header :matches "Subject" "*" { set "subject" "${1}"; }
deleteheader "Subject";
addheader "Subject" "[x] ${subject}";
"""
    outcome = sieve_of(site).run(script, mail("Subject: hello"))
    assert outcome.message.headers("Subject") == ["[x] hello"]


def test_rfc5293_7_an_error_keeps_the_original_message(site: Site) -> None:
    script = 'require ["editheader", "ihave"];\naddheader "X-New" "1";\ndeleteheader "Subject";\nerror "no";\n'
    stored = sieve_of(site).run(script, mail("Subject: hello")).message
    assert stored.header("X-New") is None
    assert stored.header("Subject") == "hello"


def test_rfc5293_7_each_action_stores_the_header_of_its_moment(site: Site) -> None:
    script = """require ["editheader", "fileinto", "copy"];
fileinto "a";
addheader "X-Step" "1";
fileinto "b";
addheader "X-Step" "2";
keep;
addheader "X-Step" "3";
"""
    outcome = sieve_of(site).run(script)
    steps = {folder: message.headers("X-Step") for folder, [message] in outcome.folders.items()}
    assert steps == {"a": [], "b": ["1"], "INBOX": ["2", "1"]}


def test_rfc5293_7_the_implicit_keep_is_at_the_end(site: Site) -> None:
    script = 'require ["editheader", "fileinto", "copy"];\nfileinto :copy "a";\naddheader "X-Step" "1";\n'
    outcome = sieve_of(site).run(script)
    assert outcome.folders["INBOX"][0].headers("X-Step") == ["1"]
    assert outcome.folders["a"][0].headers("X-Step") == []
