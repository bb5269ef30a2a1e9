// What the programs for Node share, as report.py for those in Python.
export const url = process.argv[2];
export const [sky, weather, json] = [
  "Why is the sky blue?", "What is the weather in Paris?", "Who is Ada, as JSON?"];
export const user = (content) => ({ role: "user", content });
export const parameters = {
  type: "object", properties: { city: { type: "string" } }, required: ["city"] };
export const description = "Looks up the weather.";
export const person = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
export const lookUp = (cities) => ({ city }) => {
  cities.push(city);
  return "sunny, 21 degrees";
};

export async function report(version, checks) {
  const found = { version };
  for (const [name, check] of Object.entries(checks)) {
    try {
      found[name] = await check();
    } catch (error) {
      console.error(error);
      found[name] = `${error.name}: ${error.message}`;
    }
  }
  console.log(JSON.stringify(found));
}
