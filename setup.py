"""Installs lmtpd: one module, one command, its manual pages and its units."""

import glob
import re

from setuptools import setup

with open("lmtpd.py", encoding="utf-8") as module:
    VERSION = re.search(r'^__version__ = "([^"]+)"$', module.read(), re.MULTILINE).group(1)

with open("README.md", encoding="utf-8") as readme:
    README = readme.read()

setup(
    name="lmtpd",
    version=VERSION,
    description="An LMTP delivery agent: a drop-in for Cyrus lmtpd(8) that delivers to Maildir++",
    long_description=README,
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["lmtpd"],
    python_requires=">=3.10",
    install_requires=["docopt", 'systemd-python; sys_platform == "linux"'],
    # auth: for the option sasl_pwcheck_method: file. idna: for domains beyond ASCII with the option virtdomains.
    # regex: for regular expressions in Sieve scripts. sql: for duplicate_db: sql.
    extras_require={
        "auth": ["scramp", "argon2-cffi"],
        "idna": ["idna"],
        "regex": ["google-re2"],
        "sql": ["psycopg[binary]"],
    },
    # Our own, because one that pip makes of an entry point imports more than it takes to deliver a message.
    scripts=["units/lmtpd"],
    data_files=[
        ("share/man/man8", glob.glob("man/*.8")),
        ("share/man/man7", glob.glob("man/*.7")),
        ("share/man/man5", glob.glob("man/*.5")),
        ("share/lmtpd/units", sorted({*glob.glob("units/*")} - {"units/lmtpd"})),
    ],
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Communications :: Email :: Mail Transport Agents",
    ],
)
