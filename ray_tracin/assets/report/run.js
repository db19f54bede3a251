// This run: what was done, with what, what was left out, and what it cost.

function buildRun() {
  const run = DATA.run;
  const choices = h("dl", {}, run.choices.map(([question, answer]) => [h("dt", {}, question), h("dd", {}, answer)]));
  const cost = run.cost.map((line) => [line.stage, line.keys, secondsText(line.seconds), bytesText(line.memory), bytesText(line.bytes), line.workers]);
  const total = run.cost.reduce((sum, line) => sum + line.seconds, 0);
  byId("run").replaceChildren(h("div.board", {},
    panel("How this was done", "", choices),
    panel("Slices", "", table(["split", "patients", "slices"], run.splits.map((line) => [line.split, line.patients, line.slices]))),
    panel("What was left out", "", run.skipped.length
      ? table(["case", "why"], run.skipped.map((line) => [line.case, line.reason]))
      : h("p", {}, "No case was skipped."),
    run.warnings.length ? table(["case", "read with a warning"], run.warnings.map((line) => [line.case, line.warnings])) : ""),
    panel("What it cost", `${secondsText(total)} of work in all. Memory is the largest of a worker's process.`,
      table(["stage", "keys", "work", "memory", "written", "workers"], cost)),
    panel("For other tools", "Predictions and regions as NIfTI in each patient's own orientation, with colour tables for 3D Slicer and ITK-SNAP; tables as Parquet.",
      h("pre", {}, `ray-tracin nifti --run ${shellWord(run.uri)} --out FOLDER`), h("pre", {}, `ray-tracin status --run ${shellWord(run.uri)}`)),
    panel("About this page", "", h("p", {}, privacyText()), h("p", { dataset: { testid: "size" } }, sizeText()), h("p", {}, `Rendered ${DATA.rendered}; the run's fingerprint is ${DATA.fingerprint.slice(0, 16)}….`),
      h("details", {}, h("summary", {}, "Configuration"), h("pre", { dataset: { testid: "config" } }, run.config)),
      h("details", {}, h("summary", {}, "Versions"), h("pre", {}, run.versions)))));
}

function sizeText() {
  const page = Number(document.body.dataset.size);
  const { files, bytes: beside } = DATA.beside;
  const size = `This page has ${bytesText(page)}`;
  if (!files) return `${size}, and needs no other file.`;
  return `${size}; ${files} files in the folder assets beside it have ${bytesText(beside)}, ${bytesText(page + beside)} in all. They are read when they are needed: keep page and folder together.`;
}

function shellWord(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function privacyText() {
  const use = "Research use only, not for diagnosis. The page asks nothing of any network.";
  if (DATA.synthetic) return `${use} Its patients are synthetic.`;
  if (!DATA.images) return `${use} It holds no image of a patient, but their names and what was measured of them.`;
  return `${use} It contains images of patients: keep it as you keep patient data, or render it with --no-images.`;
}
