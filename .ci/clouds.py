"""SigV4 of the relay AmazonSES against botocore's own signer (for CI; needs botocore from PyPI).

Each case is signed by both at the same second; the two Authorization headers must be the same to the letter. The body
must fit the model of the service that botocore carries.
"""

from __future__ import annotations

import datetime
import json
import sys
import unittest
from unittest import mock

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.session
import botocore.validate

import haineko

CASES = (  # base URL, region, access key, secret, token, body
    (
        "https://email.eu-west-1.amazonaws.com",
        "eu-west-1",
        "AKIDEXAMPLE",
        "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
        "",
        b"{}",
    ),
    (
        "https://email.us-east-1.amazonaws.com",
        "us-east-1",
        "AKID",
        "a/b+c=",
        "AQoDYXdz//token+=",
        b'{"a": "\xe7\x8c\xab"}',
    ),
    ("http://127.0.0.1:8080", "ap-northeast-1", "AKID", "s", "", b"x" * 100000),
    ("https://vpc.example:8443/front", "eu-central-1", "AKID", "s", "t", b""),
)
NOW = 1700000000


def route(url: str, region: str, key: str, secret: str, token: str) -> haineko.Route:
    return haineko.Route("AmazonSES", base_url=url, region=region, auth="key", credentials=(key, secret), token=token)


class Frozen(datetime.datetime):
    """botocore's clock, stopped."""

    @classmethod
    def utcnow(cls):
        return cls(1970, 1, 1) + datetime.timedelta(seconds=NOW)

    @classmethod
    def now(cls, tz=None):
        return cls(1970, 1, 1, tzinfo=tz) + datetime.timedelta(seconds=NOW)


def signed_by_botocore(call: haineko.HTTPRequest, to: haineko.Route) -> str:
    headers = {"Content-Type": call.type} if call.method == "POST" else {}
    request = botocore.awsrequest.AWSRequest(call.method, to.url + call.path, headers, call.body)
    credentials = botocore.credentials.Credentials(*to.credentials, to.token or None)
    clock = mock.patch.object(botocore.auth, "get_current_datetime", Frozen.utcnow, create=True)
    with clock, mock.patch("datetime.datetime", Frozen):
        botocore.auth.SigV4Auth(credentials, "ses", to.region).add_auth(request)
    return request.headers["Authorization"]


class Signatures(unittest.TestCase):
    def test_the_same_as_botocores(self):
        for *place, body in CASES:
            for call in (
                haineko.HTTPRequest("POST", "/v2/email/outbound-emails", body),
                haineko.HTTPRequest("GET", "/v2/email/account"),
            ):
                to = route(*place)
                with self.subTest(to.url, call=call.method):
                    ours = dict(haineko.sign_sigv4(call, to, NOW).headers)
                    self.assertEqual(ours["Authorization"], signed_by_botocore(call, to))
                    self.assertEqual(ours["x-amz-date"], "20231114T221320Z")

    def test_the_body_fits_amazons_model(self):
        model = botocore.session.get_session().get_service_model("sesv2").operation_model("SendEmail")
        octets = b"From: =?UTF-8?B?44Kt44K4?= <a@b.example>\r\nTo: c@d.example\r\n\r\nx\r\n"
        message = haineko.Message((octets,))
        job = haineko.Transaction(route(*CASES[0][:5]), "h", "Q" * 16, "e@f.example", ("c@d.example",), message)
        call = haineko.amazonses_request(job)
        body = json.loads(call.body)
        report = botocore.validate.ParamValidator().validate(body, model.input_shape)
        self.assertFalse(report.has_errors(), report.generate_report())
        self.assertEqual((model.http["method"], model.http["requestUri"]), (call.method, call.path))
        self.assertEqual(set(body) - set(model.input_shape.members), set())


if __name__ == "__main__":
    sys.exit(unittest.main())
