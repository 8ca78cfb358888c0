// Ask the page questions in a real browser, without any network:
//
//   echo '[["It is Monday. ...", 8]]' | node check.mjs MODEL_FOLDER [SCREENSHOT.png]
//
// Prints a line of JSON: the answers, and whatever the page asked of the network or complained about.

import { existsSync } from "node:fs";
import { join, normalize } from "node:path";
import { text } from "node:stream/consumers";
import { chromium } from "playwright-core";

const SITE = "http://localdepth.test/"; // every file of it comes from the disk
const [modelFolder, screenshot] = process.argv.slice(2);
const questions = JSON.parse(await text(process.stdin));
const [complaints, foreign] = [[], []];

const fileOf = (url) => {
  const path = normalize(decodeURIComponent(new URL(url).pathname.slice(1)) || "index.html");
  return path.startsWith("model/") ? join(modelFolder, path.slice("model/".length)) : join(import.meta.dirname, path);
};

/** Runs in the page, for what a person does with the mouse. */
function setDepth(slider, wanted) {
  for (slider.value = slider.max; ; slider.value--) {
    slider.dispatchEvent(new Event("input"));
    if (document.getElementById("shown-depth").textContent === String(wanted)) return;
    if (slider.value === slider.min) throw new Error(`the page offers no depth ${wanted}`);
  }
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: process.getuid?.() === 0 ? ["--no-sandbox"] : [], // which it refuses to be without as root
});
const page = await browser.newPage({ viewport: { width: 900, height: 760 } });
page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(error.message));
await page.route("**/*", (route) => {
  const url = route.request().url();
  if (!url.startsWith(SITE)) foreign.push(url);
  const file = url.startsWith(SITE) && fileOf(url);
  return file && existsSync(file) ? route.fulfill({ path: file }) : route.fulfill({ status: 404 });
});
await page.goto(SITE);
await page.waitForFunction(() => !document.getElementById("ask").disabled);

const answers = [];
for (const [question, depth] of questions) {
  await page.fill("#question", question);
  await page.$eval("#depth", setDepth, depth);
  await page.click("#ask");
  const row = page.locator(`#answers li[data-depth="${depth}"]:not([aria-busy])`);
  await row.waitFor();
  answers.push(await row.locator(".text").textContent());
}
if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });
await browser.close();
console.log(JSON.stringify({ answers, complaints, foreign }));
