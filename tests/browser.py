"""Debian's Chromium without a screen, driven over its own driver; and a certificate for an agent to show it."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE_SECONDS = 90.0


class Browser:
    """One window. Everything waits for what it names, and finds it as a person would: by its text or label."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def find(self, xpath: str) -> WebElement:
        """The first shown element, as soon as there is one."""

        def look(driver: webdriver.Chrome) -> WebElement | bool:
            return next((each for each in driver.find_elements(By.XPATH, xpath) if each.is_displayed()), False)

        return self.until(look, xpath)

    def until(self, look: object, what: str = "") -> WebElement:
        """What `look` finds in the driver, as soon as that is something."""
        waiting = WebDriverWait(self.driver, PATIENCE_SECONDS, ignored_exceptions=[StaleElementReferenceException])
        found: WebElement = waiting.until(look, what)  # type: ignore[arg-type]
        return found

    def click(self, text: str, kind: str = "*[self::a or self::button]") -> None:
        """Click the link or button of that text or label."""
        xpath = f"//{kind}[normalize-space()='{text}' or @aria-label='{text}']"

        def look(driver: webdriver.Chrome) -> bool:
            # A table that is drawn anew takes its buttons away under one's hand.
            with contextlib.suppress(WebDriverException, StopIteration):
                next(each for each in driver.find_elements(By.XPATH, xpath) if each.is_displayed()).click()
                return True
            return False

        self.until(look, xpath)

    def field(self, label: str) -> WebElement:
        """The field behind that label."""
        return self.find(f"//label[starts-with(normalize-space(), '{label}')]//*[self::input or self::select]")

    def text(self) -> str:
        """All that the page says."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def until_text(self, text: str) -> None:
        """Wait until the page says so."""
        self.until(lambda _: text in self._text_if_any(), f"the text {text!r}")

    def _text_if_any(self) -> str:
        with contextlib.suppress(WebDriverException):  # it is being loaded
            return self.text()
        return ""

    def errors(self) -> list[str]:
        """What the console complained of: script errors, and what the content security policy held back. Not that a
        page without a token was told to ask for one.
        """
        lines = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        found = [str(line["message"]) for line in lines if line["level"] == "SEVERE"]
        return [message for message in found if "/api/v1/summary" not in message or "401" not in message]


@contextlib.contextmanager
def browser(folder: Path, *, width: int = 1100, height: int = 900, dark: bool = False) -> Iterator[Browser]:
    """A window of its own, with a profile below `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",  # tests run as root
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--no-first-run",
        "--ignore-certificate-errors",
        "--lang=en-GB",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(shutil.which("chromedriver") or "chromedriver", log_output=str(folder / "chromedriver.log"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(PATIENCE_SECONDS)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield Browser(driver)
    finally:
        driver.quit()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this host alone, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    import ipaddress

    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "agent.crt", folder / "agent.key"
    certificate_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    key_path.chmod(0o600)
    return certificate_path, key_path
