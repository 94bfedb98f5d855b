"""What the checks expect; tests/doctor/test_answers.py derives it independently."""

__all__ = ["ANSWERS", "TABLES"]

# Of each codec of `rhtcomm.doctor.codec.codecs`, by the torch reference.
ANSWERS = {
    "QuicFL 1, 1 rotations": "574653286e59773e",
    "QuicFL 2, 2 rotations": "ec736402c9489d2b",
    "QuicFL 3, 3 rotations": "28bb3ca366732444",
    "QuicFL 4, 1 rotations": "c284ed31816e01c1",
    "QuicFL 5, 2 rotations": "ac3ecce8c593bd07",
    "QuicFL 6, 3 rotations": "1d7a34927c3b763e",
    "QuicFL 7, 1 rotations": "06fc0e0929f3d8b6",
    "QuicFL 8, 2 rotations": "fb4f982074a9ef97",
    "QuicFL 1, exact, 3 rotations": "046a9e61bb2d3e22",
    "QuicFL 2, exact, 1 rotations": "b0c642f952198ae3",
    "QuicFL 3, exact, 2 rotations": "b91f70247ee635f5",
    "QuicFL 4, exact, 3 rotations": "27cb52f1749795a8",
    "QuicFL 5, exact, 1 rotations": "c7cb67524e4159ce",
    "QuicFL 6, exact, 2 rotations": "478abc303b9cc69f",
    "QuicFL 7, exact, 3 rotations": "93abdccde473ed46",
    "QuicFL 8, exact, 1 rotations": "69d1467497a5184b",
    "Eden 1, 2 rotations": "8990ef175a0da68a",
    "Eden 2, 3 rotations": "179433ce7985febb",
    "Eden 3, 1 rotations": "3f8e5e769f5dbdab",
    "Eden 4, 2 rotations": "bbd93006793976f6",
    "Eden 5, 3 rotations": "38e82c88171c1bcc",
    "Eden 6, 1 rotations": "38d9198048eaf0a9",
    "Eden 7, 2 rotations": "4648d03694002f92",
    "Eden 8, 3 rotations": "c01c4927dfafaca6",
    "VectorQuantizer 1, 1 rotations": "3538b929fbd56e82",
    "VectorQuantizer 2, 2 rotations": "1388a714252638ca",
    "VectorQuantizer 4, 3 rotations": "580715bab18e6744",
    "ECDQ 1, 1 rotations": "c1bb180cd718340a",
    "ECDQ 1.5, 2 rotations": "11115e9bb65005e6",
    "ECDQ 2, 3 rotations": "cb881eea72bc99e7",
    "ECDQ 2.5, 1 rotations": "b9fbdb50091c9913",
    "ECDQ 3, 2 rotations": "b627c60564ac8830",
    "ECDQ 3.5, 3 rotations": "07aef2121d84b9d6",
    "ECDQ 4, 1 rotations": "3f8450a48d165f4e",
    "ECDQ 4.5, 2 rotations": "c4ae709a95c5c8f5",
    "ECDQ 5, 3 rotations": "e807b5a4bf7d9039",
    "ECDQ 5.5, 1 rotations": "a5025cb2e5f9737e",
    "ECDQ 6, 2 rotations": "15fe4a3734d1b179",
}

# Of each table of rhtcomm/codebooks, by `rhtcomm.doctor.installation.digest`.
TABLES = {
    "ecdq": "7659065a9a2eedce7a83a2a2210a4733",
    "lloyd_max": "fd26639dcb5949cd861848ea4db90836",
    "quic_fl": "251f2f8c95e5e174db3153b64427e2c7",
    "quic_fl_exact": "dcb7ca77f4dbcf4ae1f6144bed0622ce",
    "vector": "003960e919210833157ec00dafdffd31",
}
