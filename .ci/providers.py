"""The clients of SendGrid, Postmark and Resend against a running Haineko (for CI).

Each client that is installed sends text, HTML, a file, a picture within the HTML, Cc, Bcc, Reply-To and fields of its
own, then a batch, then a mail that is refused; what arrived at the next hop is compared with what the program said.
Python's clients are looked for in this interpreter, node's below $NODE_PATH; one that is not there is skipped.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import subprocess
import sys
import unittest
from email.mime.image import MIMEImage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import test_haineko as peers

KEY = "kijitora:kijitora"
PNG = base64.b64encode(peers.PNG).decode()
FROM, TO, CC, BCC, REPLY = "k@example.org", "to@example.jp", "cc@example.jp", "bcc@example.jp", "reply@example.org"
HTML = '<p>Nyaa<img src="cid:logo"></p>'
NODE = {
    "@sendgrid/mail": """
const sg = require('@sendgrid/mail'); sg.setApiKey(process.env.KEY);
sg.client.setDefaultRequest('baseUrl', process.env.U);
const mail = {from: {email: M.from, name: 'Kiji, tora'}, to: [{email: M.to, name: 'Mike'}], cc: M.cc, bcc: M.bcc,
  replyTo: M.reply, subject: M.subject, text: M.text, html: M.html, headers: {'X-Cat': '1'}, attachments: [
    {content: M.file, filename: 'a.txt', type: 'text/plain', disposition: 'attachment'},
    {content: M.png, filename: 'l.png', type: 'image/png', disposition: 'inline', contentId: 'logo'}]};
const batch = {from: M.from, subject: 'batch', text: 'x', to: ['b1@example.jp', 'b2@example.jp']};
(async () => { const [said] = await sg.send(mail); const ok = said.statusCode === 202 && said.headers['x-message-id'];
  await sg.sendMultiple(batch);
  let error = ''; try { await sg.send({...mail, to: '@', subject: 'bad'}); }
  catch (e) { error = e.code + ' ' + e.response.body.errors[0].message; }
  console.log(JSON.stringify({ok: !!ok, error})); })();
""",
    "postmark": """
const {ServerClient} = require('postmark');
const client = new ServerClient(process.env.KEY, {requestHost: process.env.U.slice(7), useHttps: false});
const mail = {From: '"Kiji, tora" <' + M.from + '>', To: 'Mike <' + M.to + '>', Cc: M.cc, Bcc: M.bcc, ReplyTo: M.reply,
  Subject: M.subject, TextBody: M.text, HtmlBody: M.html, Headers: [{Name: 'X-Cat', Value: '1'}], Attachments: [
    {Name: 'a.txt', Content: M.file, ContentType: 'text/plain', ContentID: ''},
    {Name: 'l.png', Content: M.png, ContentType: 'image/png', ContentID: 'cid:logo'}]};
const one = to => ({From: M.from, To: to, Subject: 'batch', TextBody: 'x'});
(async () => { const said = await client.sendEmail(mail);
  const both = await client.sendEmailBatch([one('b1@example.jp'), one('b2@example.jp')]);
  let error = ''; try { await client.sendEmail({...mail, To: '@'}); } catch (e) { error = e.code + ' ' + e.message; }
  const ok = said.ErrorCode === 0 && said.MessageID && both.every(item => item.ErrorCode === 0);
  console.log(JSON.stringify({ok: !!ok, error})); })();
""",
    "resend": """
const {Resend} = require('resend'); const client = new Resend(process.env.KEY, {baseUrl: process.env.U});
const mail = {from: '"Kiji, tora" <' + M.from + '>', to: ['Mike <' + M.to + '>'], cc: M.cc, bcc: [M.bcc],
  replyTo: M.reply, subject: M.subject, text: M.text, html: M.html, headers: {'X-Cat': '1'}, attachments: [
    {content: Buffer.from(M.file, 'base64'), filename: 'a.txt'},
    {content: M.png, filename: 'l.png', contentType: 'image/png', contentId: 'logo'}]};
const one = to => ({from: M.from, to, subject: 'batch', text: 'x'});
(async () => { const said = await client.emails.send(mail);
  const both = await client.batch.send([one('b1@example.jp'), one('b2@example.jp')]);
  const refused = await client.emails.send({...mail, to: '@'});
  const ok = said.data && said.data.id && both.data && both.data.data.length === 2;
  console.log(JSON.stringify({ok: !!ok, error: refused.error.name + ' ' + refused.error.message})); })();
""",
}
MAIL = {
    "from": FROM, "to": TO, "cc": CC, "bcc": BCC, "reply": REPLY, "subject": "Nyaa ☃", "text": "Meow.", "html": HTML,
    "file": base64.b64encode(b"nya\n").decode(), "png": PNG,
}  # fmt: skip


def by_sendgrid(url: str) -> tuple:
    from python_http_client.exceptions import BadRequestsError
    from sendgrid import SendGridAPIClient
    from sendgrid.helpers import mail as parts

    client = SendGridAPIClient(KEY, host=url)
    mail = parts.Mail((FROM, "Kiji, tora"), parts.To(TO, "Mike"), MAIL["subject"], MAIL["text"], HTML)
    mail.add_cc(CC)
    mail.add_bcc(BCC)
    mail.reply_to = REPLY
    mail.add_header(parts.Header("X-Cat", "1"))
    mail.add_attachment(parts.Attachment(MAIL["file"], "a.txt", "text/plain"))
    mail.add_attachment(parts.Attachment(PNG, "l.png", "image/png", "inline", content_id="logo"))
    said = client.send(mail)
    both = client.send(parts.Mail(FROM, ["b1@example.jp", "b2@example.jp"], "batch", "x", is_multiple=True))
    ok = said.status_code == both.status_code == 202 and said.headers["X-Message-Id"]
    try:
        client.send(parts.Mail(FROM, "nobody@-", "bad", "x"))
    except BadRequestsError as error:
        return ok, f"{error.status_code} {error.to_dict['errors'][0]['message']}"
    return ok, ""


def by_postmarker(url: str) -> tuple:
    from postmarker.core import PostmarkClient
    from postmarker.exceptions import ClientError

    client = PostmarkClient(server_token=KEY, root_api_url=url + "/")
    mail = {"From": f'"Kiji, tora" <{FROM}>', "To": f"Mike <{TO}>", "Cc": CC, "Bcc": BCC, "ReplyTo": REPLY}
    mail.update(Subject=MAIL["subject"], TextBody=MAIL["text"], HtmlBody=HTML, Headers={"X-Cat": "1"})
    mail["Attachments"] = [
        {"Name": "a.txt", "Content": MAIL["file"], "ContentType": "text/plain"},
        {"Name": "l.png", "Content": PNG, "ContentType": "image/png", "ContentID": "cid:logo"},
    ]
    said = client.emails.send(**mail)
    one = {"From": FROM, "Subject": "batch", "TextBody": "x"}
    both = client.emails.send_batch({**one, "To": "b1@example.jp"}, {**one, "To": "b2@example.jp"})
    ok = said["ErrorCode"] == 0 and [item["ErrorCode"] for item in both] == [0, 0]
    try:
        client.emails.send(**{**mail, "To": "@"})
    except ClientError as error:
        return ok, str(error)
    return ok, ""


def by_resend(url: str) -> tuple:
    import resend

    resend.api_key, resend.api_url = KEY, url
    mail = {"from": f'"Kiji, tora" <{FROM}>', "to": [f"Mike <{TO}>"], "cc": CC, "bcc": BCC, "reply_to": REPLY}
    mail.update(subject=MAIL["subject"], text=MAIL["text"], html=HTML, headers={"X-Cat": "1"})
    mail["attachments"] = [
        {"filename": "a.txt", "content": list(b"nya\n")},
        {"filename": "l.png", "content": PNG, "content_type": "image/png", "content_id": "logo"},
    ]
    said = resend.Emails.send(mail)
    one = {"from": FROM, "subject": "batch", "text": "x"}
    both = resend.Batch.send([{**one, "to": "b1@example.jp"}, {**one, "to": "b2@example.jp"}])
    ok = bool(said["id"]) and len(both["data"]) == 2
    try:
        resend.Emails.send({**mail, "to": "@"})
    except resend.exceptions.ResendError as error:
        return ok, f"{error.code} {error}"
    return ok, ""


def by_anymail(provider: str):
    def send(url: str) -> tuple:
        from anymail.exceptions import AnymailError
        from django.conf import settings
        from django.core.mail import EmailMultiAlternatives, get_connection

        if not settings.configured:
            settings.configure()
        keys = {"sendgrid": {"api_key": KEY}, "resend": {"api_key": KEY}, "postmark": {"server_token": KEY}}[provider]
        place = url + ("/v3/" if provider == "sendgrid" else "/")
        backend = f"anymail.backends.{provider}.EmailBackend"
        connection = get_connection(backend, api_url=place, **keys)
        mail = EmailMultiAlternatives(
            MAIL["subject"], MAIL["text"], f'"Kiji, tora" <{FROM}>', [f"Mike <{TO}>"], [BCC], connection, cc=[CC],
            reply_to=[REPLY], headers={"X-Cat": "1"},
        )  # fmt: skip
        mail.attach_alternative(HTML, "text/html")
        mail.attach("a.txt", b"nya\n", "text/plain")
        picture = MIMEImage(peers.PNG, "png")
        picture.add_header("Content-Disposition", "inline", filename="l.png")
        picture.add_header("Content-ID", "<logo>")
        mail.attach(picture)
        mail.send()
        ok = {to: item.status for to, item in mail.anymail_status.recipients.items()}
        batch = EmailMultiAlternatives("batch", "x", FROM, ["b1@example.jp", "b2@example.jp"], connection=connection)
        batch.merge_metadata = {"b1@example.jp": {"a": 1}, "b2@example.jp": {"a": 2}}
        batch.send()
        try:
            EmailMultiAlternatives("bad", "x", "nobody@-", [TO], connection=connection).send()
        except AnymailError as error:
            return set(ok.values()) <= {"sent", "queued"}, str(error)
        return False, "no error"

    return send


PYTHON = {
    "sendgrid": by_sendgrid,
    "postmarker": by_postmarker,
    "resend": by_resend,
    **{f"anymail.backends.{provider}": by_anymail(provider) for provider in ("sendgrid", "postmark", "resend")},
}


class Clients(peers.Peers):
    def setUp(self) -> None:
        super().setUp()
        self.hop = self.peer()
        force = {
            "smtpd": {"hostname": peers.NAME, "max_rcpts_per_message": 0},
            "queue": {"path": "q.db", "min_free": 0},
        }
        force.update(mailertable={"default": {"port": self.hop.port}})
        force.update(password={"kijitora": peers.SettingsFile.KIJITORA})
        self.server = peers.served(self, force)
        self.url = self.server.urls[0].rstrip("/")

    def check(self, ok, error: str) -> None:
        """Compare what arrived with what the program said."""
        log = self.server.log()
        self.assertTrue(ok, log)
        self.assertRegex(error, "(?i)invalid|address")
        peers.eventually(self.server.idle)
        got = [item for item in self.hop.taken if peers.parsed(item.text)["subject"] != "batch"]
        self.assertEqual(sorted(to for item in got for to in item.recipients), [BCC, CC, TO], log)
        batch = [item.recipients[0] for item in self.hop.taken if peers.parsed(item.text)["subject"] == "batch"]
        self.assertEqual(sorted(batch), ["b1@example.jp", "b2@example.jp"], log)
        mail = peers.parsed(got[0].text)
        self.assertEqual((got[0].sender, str(mail["from"])), (FROM, f'"Kiji, tora" <{FROM}>'))
        self.assertEqual((mail["to"], mail["cc"], mail["bcc"], mail["reply-to"]), (f"Mike <{TO}>", CC, None, REPLY))
        self.assertEqual((mail["subject"], mail["x-cat"]), (MAIL["subject"], "1"))
        self.assertEqual(mail.get_body(("plain",)).get_content().strip(), MAIL["text"])
        self.assertEqual(mail.get_body(("html",)).get_content().strip(), HTML)
        files = {part.get_filename(): part for part in mail.walk() if part.get_filename()}
        self.assertEqual(files["a.txt"].get_payload(decode=True).split(), [b"nya"])
        self.assertEqual(files["l.png"].get_payload(decode=True), peers.PNG)
        self.assertEqual((files["l.png"]["content-id"], files["l.png"].get_content_disposition()), ("<logo>", "inline"))


def of_python(name: str):
    def test(self) -> None:
        try:
            importlib.import_module(name)
        except ImportError as error:
            self.skipTest(str(error))
        self.check(*PYTHON[name](self.url))

    return test


def of_node(name: str):
    def test(self) -> None:
        node = shutil.which("node")
        if not node or not os.path.isdir(os.path.join(os.environ.get("NODE_PATH", ""), name)):
            self.skipTest(f"{name} is not installed")
        source = f"const M = {json.dumps(MAIL)};\n{NODE[name]}"
        env = {**os.environ, "U": self.url, "KEY": KEY}
        done = subprocess.run([node, "-e", source], env=env, capture_output=True, text=True, timeout=30, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        self.check(found["ok"], found["error"])

    return test


for client in PYTHON:
    setattr(Clients, f"test_python_{client.replace('.', '_')}", of_python(client))
for client in NODE:
    setattr(Clients, f"test_node_{client.replace('/', '_')}", of_node(client))


class Description(peers.Quiet):
    def test_openapi_is_valid(self) -> None:
        try:
            from openapi_spec_validator import validate
        except ImportError as error:
            self.skipTest(str(error))
        validate(peers.served(self, {}).get("/openapi.json")[1])


if __name__ == "__main__":
    sys.exit(unittest.main(argv=[sys.argv[0], "Clients", "Description"]))
