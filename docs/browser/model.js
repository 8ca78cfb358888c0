// A looped model in ONNX Runtime: the graph looped.onnx, its caches, and greedy decoding.
//
// The graph holds the core once and runs it as often as the caches of the core have planes. ONNX Runtime on the web
// cannot write caches in place, so each call is given those that the call before it returned.

import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send

export class LoopedModel {
  #session;
  #tokenizer;
  #template;
  #special;

  /** Open a folder that `localdepth export onnx` wrote. */
  static async load(folder) {
    const get = async (name) => {
      const response = await fetch(`${folder}/${name}`);
      if (!response.ok) throw new Error(`${folder}/${name}: ${response.status} ${response.statusText}`);
      return response;
    };
    const bytes = async (name) => new Uint8Array(await (await get(name)).arrayBuffer());
    const json = async (name) => (await get(name)).json();
    const template = async () => {
      const response = await fetch(`${folder}/chat_template.jinja`); // which not every model has
      return response.ok ? new Template(await response.text()) : null;
    };
    const [record, graph, weights, rules, settings, chat] = await Promise.all([
      json("config.json"),
      bytes("looped.onnx"),
      bytes("weights.bin"),
      json("tokenizer.json"),
      json("tokenizer_config.json"),
      template(),
    ]);
    const externalData = [{ path: "weights.bin", data: weights }];
    const session = await ort.InferenceSession.create(graph, { externalData });
    return new LoopedModel(record, session, new Tokenizer(rules, settings), chat);
  }

  constructor(record, session, tokenizer, template) {
    this.config = record.model;
    this.#special = record.tokenizer;
    this.#session = session;
    this.#tokenizer = tokenizer;
    this.#template = template;
  }

  /** Answer a question `depth` passes deep; yields { text, nTokens, ms } after each token, ms of all but the first. */
  async *answer(question, depth, maxTokens = 128) {
    const generated = [];
    let ids = this.#encode(question);
    let caches = this.#emptyCaches(depth);
    let [nTotal, ms] = [0, 0];
    while (generated.length < maxTokens) {
      nTotal += ids.length;
      if (nTotal > this.config.n_ctx) throw new Error(`more than the ${this.config.n_ctx} tokens this model reads`);
      const start = performance.now();
      const outputs = await this.#session.run({ ...this.#inputs(ids, nTotal), ...caches });
      if (generated.length) ms += performance.now() - start;
      caches = this.#cachesIn(outputs);
      const token = argmax(outputs.logits.data);
      if (this.#special.eos.includes(token)) return;
      generated.push(token);
      ids = [token];
      const text = this.#tokenizer.decode(generated, { skip_special_tokens: true }).trim();
      yield { text, nTokens: generated.length, ms };
    }
  }

  #encode(question) {
    const { bos, eos, add_bos: addBos } = this.#special;
    const name = (id) => (id == null ? "" : this.#tokenizer.id_to_token(id));
    const messages = [{ role: "user", content: question }];
    const tokens = { bos_token: name(bos), eos_token: name(eos[0]) };
    const text = this.#template?.render({ messages, add_generation_prompt: true, ...tokens }) ?? question;
    const { ids } = this.#tokenizer.encode(text, { add_special_tokens: false });
    return addBos && ids[0] !== bos ? [bos, ...ids] : ids;
  }

  #inputs(ids, nTotal) {
    const width = this.config.n_embd;
    return {
      ids: new ort.Tensor("int64", ids.map(BigInt), [1, ids.length]),
      n_total: new ort.Tensor("int32", [nTotal], [1]),
      state: new ort.Tensor("float32", new Float32Array(width), [1, 1, width]), // zeros, for all positions
      rows: new ort.Tensor("int64", [-1n], [1]), // the last one's logits
    };
  }

  #emptyCaches(depth) {
    const sizes = { n_passes: depth, n_past: 0 };
    const past = this.#session.inputMetadata.filter(({ name }) => name.startsWith("past."));
    return Object.fromEntries(
      past.map(({ name, shape }) => [name, new ort.Tensor("float32", [], shape.map((size) => sizes[size] ?? size))]),
    );
  }

  #cachesIn(outputs) {
    const present = Object.entries(outputs).filter(([name]) => name.startsWith("present."));
    return Object.fromEntries(present.map(([name, tensor]) => [name.replace("present.", "past."), tensor]));
  }
}

function argmax(numbers) {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
  return best;
}
