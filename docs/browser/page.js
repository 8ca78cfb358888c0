// The page: a question, a depth, and one answer for each depth that was tried.

const EXAMPLES = {
  digits: "Start with 22. Add 35. Take away 9. Add 8. Double it. Plus 5. Which digit is last?",
  cups: "Sara hides a coin under the red cup. The green and black cups change places. The red and blue cups change places. The red and black cups change places. The green and black cups change places. Which cup hides the coin?",
  days: "It is Monday. Go 5 days forward. Move 9 days into the past. Move ahead 5 days. Go 3 days forward. What day is it then?",
  robot: "At first the robot points south. Rotate right. Make a left turn. Rotate left. Make a left turn. In which direction does the robot point?",
  lift: "Lumond starts from floor 3. Go down 2. Climb 3 floors. Ride up 1 floor. Ride up 3 floors. On which floor does Lumond end?",
  "something else": "What is the capital of France?",
};
const DEPTHS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64];
const FRAME_MS = 16; // between glimpses of an answer in the making

const [form, question, slider, shownDepth, examples, button, status, answers, row] = [
  "form", "question", "depth", "shown-depth", "examples", "ask", "status", "answers", "row",
].map((id) => document.getElementById(id));
let model = null;
let asked = 0; // questions so far: an answer stops where a newer one has begun

const depth = () => Number(DEPTHS[slider.value]);

function showDepth() {
  shownDepth.textContent = depth();
  slider.setAttribute("aria-valuetext", `${depth()} passes`);
}

/** The row of a depth among the answers, in order; answers to another question go. */
function rowFor(text, passes) {
  if (answers.dataset.question !== text) answers.replaceChildren();
  answers.dataset.question = text;
  const after = [...answers.children].find((item) => Number(item.dataset.depth) >= passes);
  const made = row.content.firstElementChild.cloneNode(true);
  made.dataset.depth = passes;
  made.querySelector(".passes").textContent = passes;
  if (Number(after?.dataset.depth) === passes) after.replaceWith(made);
  else answers.insertBefore(made, after ?? null);
  return made;
}

async function ask() {
  const text = question.value.trim();
  if (!model || !text) return;
  const number = ++asked;
  const shown = rowFor(text, depth());
  shown.setAttribute("aria-busy", "true");
  try {
    await follow(model.answer(text, depth()), shown, () => number === asked);
  } catch (error) {
    shown.classList.add("failed");
    shown.querySelector(".text").textContent = error.message;
  }
  shown.removeAttribute("aria-busy");
}

/** Show an answer while it grows. */
async function follow(answer, shown, isWanted) {
  let [last, painted] = [null, performance.now()];
  const paint = () => {
    if (!last) return;
    shown.querySelector(".text").textContent = last.text;
    shown.querySelector(".speed").textContent = pace(last);
  };
  for await (last of answer) {
    if (performance.now() - painted < FRAME_MS) continue;
    paint();
    await new Promise((resume) => setTimeout(resume));
    painted = performance.now();
    if (!isWanted()) return;
  }
  paint();
}

/** The first token comes with the prompt and says nothing of those that follow. */
function pace({ nTokens, ms }) {
  const speed = nTokens > 1 ? `, ${Math.round((1000 * (nTokens - 1)) / ms)} a second` : "";
  return `${nTokens} token${nTokens === 1 ? "" : "s"}${speed}`;
}

function offer(name, text) {
  const chip = document.createElement("button");
  chip.type = "button";
  chip.textContent = name;
  chip.addEventListener("click", () => {
    question.value = text;
    ask();
  });
  examples.append(chip);
}

async function start() {
  for (const [name, text] of Object.entries(EXAMPLES)) offer(name, text);
  question.value = EXAMPLES.digits;
  showDepth();
  slider.addEventListener("input", showDepth);
  slider.addEventListener("change", ask);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  try {
    const { LoopedModel } = await import("./model.js"); // here, so that a library that is missing is told
    model = await LoopedModel.load("model");
  } catch (error) {
    status.textContent = `Something is missing: ${error.message}. README.md says how to set this page up.`;
    status.classList.add("failed");
    return;
  }
  const { n_prelude: prelude, n_core: core, n_coda: coda, max_depth: most, default_depth: usual } = model.config;
  slider.max = DEPTHS.filter((passes) => passes <= most).length - 1;
  slider.value = DEPTHS.findLastIndex((passes) => passes <= usual);
  showDepth();
  status.textContent = `Ready: ${prelude} + ${core} × depth + ${coda} layers, all of it on this machine.`;
  button.disabled = false;
}

start();
